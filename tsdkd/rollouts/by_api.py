"""Completions by models behind an OpenAI-compatible API: a hosted model, `vllm serve`, llama.cpp.

Every reply is appended to a file under its request's hash as soon as it is there, so that no request is paid for twice; what
failed is kept in a file of its own and asked again by the next run. A key is read from the environment, and written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tsdkd.data.rows import RowFile, append_rows, read_rows, replace_rows
from tsdkd.provenance import redacted

DOWN_AFTER = 3  # requests in a row that no server answered
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPTIONS = ("temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty", "extra_body",
            "max_completion_tokens", "reasoning_effort", "n")  # fmt: skip


class APIError(ConnectionError):
    """A model behind an API gave nothing; what it gave before is kept."""


@dataclass(frozen=True)
class APIModel:
    """A model behind an API.

    Args:
        name: what it is called here.
        base_url: of the API, e.g. `http://127.0.0.1:8000/v1`.
        model: the model's name there.
        api_key_env: the environment variable that holds its key; None: none is needed.
        options: of sampling, as the API takes them (temperature, top_p, max_tokens, seed, stop, …).
        concurrency: requests at a time.
        timeout: seconds of one request.
        tries: of a request, with growing pauses (`Retry-After` is kept to).
        price: `{"input": …, "output": …}` of a million tokens; `"auto"` asks the package genai-prices; None: unknown.
        log_probs: ask for the tokens' log-probabilities, and keep their mean.

    Raises:
        ValueError: an address, a number or an option that cannot work.
    """

    name: str
    base_url: str
    model: str
    api_key_env: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 4
    timeout: float = 120.0
    tries: int = 5
    price: Any = None
    log_probs: bool = False

    def __post_init__(self) -> None:
        where = f"the teacher {self.name!r}"
        if not self.name or any(c in self.name for c in "/\\\0") or self.name in (".", ".."):
            raise ValueError(f"{where}: a name is that of a file too, without / and \\.")
        try:
            parts = urlsplit(self.base_url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except (ValueError, AttributeError):
            fine = False
        if not fine:
            raise ValueError(f"{where}: base_url={redacted(self.base_url)!r} is no address; http://HOST:PORT/v1 is one.")
        if parts.username or parts.password:
            raise ValueError(f"{where}: its base_url holds a password. Name the variable that holds it, api_key_env.")
        if parts.scheme == "http" and self.api_key_env and parts.hostname not in _LOOPBACK:
            raise ValueError(f"{where}: its key would go over http unencrypted: use https.")
        for name, smallest in (("concurrency", 1), ("tries", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"{where}: {name}={value!r} must be a whole number of at least {smallest}.")
        if not isinstance(self.timeout, (int, float)) or not 0 < self.timeout < float("inf"):
            raise ValueError(f"{where}: timeout={self.timeout!r} must be seconds above 0.")
        unknown = sorted(set(self.options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"{where}: the options {', '.join(unknown)} are unknown; there are: {', '.join(_OPTIONS)}.")
        if self.options.get("n", 1) != 1:
            raise ValueError(f"{where}: n={self.options['n']}: ask for several samples with `samples`, one reply each.")
        is_list = isinstance(self.price, Mapping) and set(self.price) == {"input", "output"}
        if self.price not in (None, "auto") and not is_list:
            raise ValueError(f"{where}: price={self.price!r}; give {{input: …, output: …}} of a million tokens, or auto.")

    @classmethod
    def of(cls, given: Any) -> APIModel:
        """From a mapping of a YAML file.

        Raises:
            ValueError: something is missing or unknown.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"a teacher is a mapping with name, base_url and model, not {given!r}.")
        known = [member.name for member in fields(cls)]
        own = {name: given[name] for name in given if name in known and name != "options"}
        options = {**(given.get("options") or {}), **{name: given[name] for name in given if name in _OPTIONS}}
        unknown = sorted(set(given) - set(known) - set(_OPTIONS))
        missing = [name for name in ("name", "base_url", "model") if not given.get(name)]
        if unknown or missing:
            what = f"lacks {', '.join(missing)}" if missing else f"has the unknown fields {', '.join(unknown)}"
            more = "" if missing else f"; there are: {', '.join([*known, *_OPTIONS])}"
            raise ValueError(f"the teacher {given.get('name', redacted(dict(given)))!r} {what}{more}.")
        return cls(**own, options=options)

    @property
    def key(self) -> str | None:
        """Its key.

        Raises:
            ValueError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        found = os.environ.get(self.api_key_env, "")
        if not found.strip():
            raise ValueError(f"the teacher {self.name!r} takes its key from ${self.api_key_env}, which is not set: export it.")
        return found.strip()

    def refuse_missing_key(self) -> None:
        """Raise a ValueError where `key` would."""
        _ = self.key

    @property
    def settings(self) -> dict[str, Any]:
        """What its replies depend on; where it is reached and what it costs is not part of it."""
        return {"name": self.name, "model": self.model, "options": self.options, "log_probs": self.log_probs}

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost; None where no price is known."""
        if self.price is None:
            return None
        if self.price == "auto":
            return _listed_price(self.model, prompt_tokens, completion_tokens)
        return (prompt_tokens * float(self.price["input"]) + completion_tokens * float(self.price["output"])) / 1e6


def _listed_price(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    try:
        from genai_prices import Usage, calc_price
    except ImportError as error:
        raise ValueError("price: auto needs the package genai-prices: pip install genai-prices.") from error
    try:
        return float(calc_price(Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens), model).total_price)
    except LookupError:
        return None


def _is_spent(error: Any) -> bool:
    """Whether a rate limit is one that waiting does not lift."""
    return "insufficient_quota" in str(error) or "exceeded your current quota" in str(error)


@dataclass(frozen=True)
class Asked:
    """A request: chat messages, and which of several samples of them it is."""

    messages: Sequence[Mapping[str, str]]
    sample: int = 0

    def hash(self, model: APIModel) -> str:
        """What its reply is kept under."""
        text = json.dumps([model.settings, [dict(message) for message in self.messages], self.sample], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class APIWriter:
    """Asks one model, several requests at a time.

    Args:
        model: which.
        folder: where its replies are kept, `NAME.jsonl`, and what failed, `NAME.failed.jsonl`.
        say: what tells of failures.
        pause: seconds before a second try, doubled for each further one.

    Raises:
        ValueError: its key is not set, or `openai` or `tenacity` are not installed.
    """

    def __init__(self, model: APIModel, folder: Path, say: Callable[[str], None] = print, pause: float = 1.0) -> None:
        self.model, self.say, self.pause = model, say, pause
        self._secret = model.key
        try:
            import openai
        except ImportError as error:
            raise ValueError("models behind an API need openai and tenacity: pip install 'tsdkd[pipelines]'.") from error
        self._openai = openai
        loopback = urlsplit(model.base_url).hostname in _LOOPBACK
        self._client = openai.OpenAI(
            base_url=model.base_url,
            api_key=self._secret or "none",
            max_retries=0,  # the tries are counted here
            timeout=model.timeout,
            http_client=openai.DefaultHttpxClient(trust_env=not loopback),  # no proxy stands before this machine itself
        )
        self._failed = folder / f"{model.name}.failed.jsonl"
        self._file = RowFile(folder / f"{model.name}.jsonl", "remove it, that reply is then asked for again")
        self._known = {row["hash"]: row for row in self._file.rows}
        self._lock = threading.Lock()
        self._in_a_row = 0
        self.fresh = self.prompt_tokens = self.completion_tokens = 0  # of this run

    def missing(self, asked: Sequence[Asked]) -> int:
        """How many of them have no reply yet."""
        return sum(each.hash(self.model) not in self._known for each in asked)

    def __call__(self, asked: Sequence[Asked], progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
        """The replies, in the order of the requests; one that failed after every try has no `text` and an `error`.

        Returns:
            rows with `hash`, `text`, `finish` (`length` of one that was cut), `prompt_tokens`, `completion_tokens`, `seconds`
            and, where it was asked for, `mean_log_prob`.

        Raises:
            APIError: no server answers, or the model refuses whoever asks; what came before is kept.
        """
        found: dict[int, dict[str, Any]] = {}
        open_ = []
        for number, each in enumerate(asked):
            reply = self._known.get(each.hash(self.model))
            if reply is None:
                open_.append(number)
            else:
                found[number] = reply
        failures = []
        for number, reply in self._asked([(number, asked[number]) for number in open_]):
            found[number] = reply
            if "error" in reply:
                failures.append(reply)
            if progress is not None:
                progress(len(found), len(asked))
        self._keep_failures(failures)
        return [found[number] for number in range(len(asked))]

    def _asked(self, open_: Sequence[tuple[int, Asked]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Replies as they come; no more requests are in flight than the model takes at a time."""
        waiting = iter(open_)
        running: dict[Future, int] = {}
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            try:
                while True:
                    while len(running) < self.model.concurrency and (following := next(waiting, None)) is not None:
                        running[pool.submit(self._reply, following[1])] = following[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()

    def _reply(self, asked: Asked) -> dict[str, Any]:
        """One reply, kept; or what became of its tries."""
        openai, key = self._openai, asked.hash(self.model)
        began = time.monotonic()
        try:
            reply = self._tried(asked)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise APIError(self._refused(error)) from None
        except openai.NotFoundError as error:
            raise APIError(f"{self._who} has no model {self.model.model!r}, or is no such API: {self._told(error)}.") from None
        except openai.APIError as error:
            down = isinstance(error, openai.APIConnectionError) or getattr(error, "status_code", 0) >= 500
            with self._lock:
                self._in_a_row = self._in_a_row + 1 if down else 0
                gone = self._in_a_row >= DOWN_AFTER
            if gone or _is_spent(error):
                tries = f", after {self.model.tries} tries of each of {self._in_a_row} requests" if gone else ""
                kept = f"{len(self._known):,} replies are kept in {self._file.path}; start again and it goes on."
                raise APIError(f"{self._who} gives no more replies{tries}: {self._told(error)}. {kept}") from None
            return {"hash": key, "error": self._told(error), "tries": self.model.tries}
        row = {"hash": key, "sample": asked.sample, **reply, "seconds": round(time.monotonic() - began, 3)}
        self._file.add(row)
        with self._lock:
            self._in_a_row = 0
            self._known[key] = row
            self.fresh += 1
            self.prompt_tokens += row["prompt_tokens"]
            self.completion_tokens += row["completion_tokens"]
        return row

    def _tried(self, asked: Asked) -> dict[str, Any]:
        """A reply, after as many tries as the model has."""
        import tenacity

        openai = self._openai
        again = (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
            openai.APIResponseValidationError,
        )

        def worth(error: BaseException) -> bool:
            return isinstance(error, again) and not _is_spent(error)

        growing = tenacity.wait_exponential(multiplier=self.pause, max=60 * self.pause) + tenacity.wait_random(0, self.pause)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked_for = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            return float(asked_for) if asked_for.replace(".", "", 1).isdigit() else growing(state)

        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.model.tries),
            wait=pause,
            retry=tenacity.retry_if_exception(worth),
            reraise=True,
        )
        return tries(self._once, asked)

    def _once(self, asked: Asked) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.model.options)
        if self.model.log_probs:
            options["logprobs"] = True
        if "seed" in options:
            options["seed"] = options["seed"] + asked.sample
        messages: Any = [dict(message) for message in asked.messages]
        try:
            made = self._client.chat.completions.create(model=self.model.model, messages=messages, **options)
            choice = made.choices[0]
            text, usage = choice.message.content, made.usage
            log_probs = [token.logprob for token in (choice.logprobs.content if choice.logprobs else None) or ()]
        except self._openai.APIError:
            raise
        except (AttributeError, IndexError, TypeError, KeyError, ValueError) as error:  # half a reply, or of another shape
            nowhere: Any = None
            raise self._openai.APIConnectionError(message=f"the reply cannot be read ({error})", request=nowhere) from error
        row = {
            "text": text if isinstance(text, str) else "",
            "finish": choice.finish_reason,
            "prompt_tokens": getattr(usage, "prompt_tokens", 0) or 0,
            "completion_tokens": getattr(usage, "completion_tokens", 0) or 0,
        }
        return {**row, "mean_log_prob": sum(log_probs) / len(log_probs)} if log_probs else row

    def _keep_failures(self, failures: list[dict[str, Any]]) -> None:
        """The file of what failed: of this run, and of earlier ones what has no reply yet."""
        earlier = read_rows(self._failed, "remove it") if self._failed.is_file() else []
        fresh = {row["hash"] for row in failures}
        left = [row for row in earlier if row["hash"] not in self._known and row["hash"] not in fresh]
        if earlier and len(left) < len(earlier):
            replace_rows(self._failed, left)
        if failures:
            append_rows(self._failed, failures)
            self.say(f"{self._who}: {len(failures):,} requests failed, e.g. {failures[0]['error']}; the next run asks again")

    @property
    def _who(self) -> str:
        return f"the teacher {self.model.name!r} at {self.model.base_url}"

    def _refused(self, error: Exception) -> str:
        how = f"the key in ${self.model.api_key_env}" if self.model.api_key_env else "a request without a key (api_key_env)"
        return f"{self._who} refuses {how}: {self._told(error)}. {len(self._known):,} replies are kept in {self._file.path}."

    def _told(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        cause = error.__cause__
        text += f" ({cause})" if cause is not None and str(cause) and str(cause) not in text else ""
        return (text.replace(self._secret, "<secret>") if self._secret else text)[:300].rstrip(".")

    def close(self) -> None:
        """Close the file and the connections."""
        self._file.close()
        self._client.close()

    def __enter__(self) -> APIWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

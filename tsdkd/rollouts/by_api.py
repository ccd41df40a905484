"""Completions by models behind an OpenAI-compatible API: a hosted model, `vllm serve`, llama.cpp.

Every reply is appended to a file under its request's hash as soon as it is there, so that no request is paid for twice; what
failed is kept in a file of its own and asked again by the next run. A key is read from the environment, and written nowhere.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tsdkd.checks import LOOPBACK
from tsdkd.data.rows import RowFile, append_rows, read_rows, replace_rows
from tsdkd.rollouts.api_models import APIModel, Asked

DOWN_AFTER = 3  # requests in a row that no server answered
REFUSED_AFTER = 20  # requests in a row that failed in any way
LONGEST = 600.0  # seconds that a server may ask to be left alone


def _text_of(content: Any) -> str:
    """A reply's text, of one that comes in parts the text parts; halves of characters are replaced."""
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else vars(part) for part in content]
        content = "".join(str(part.get("text") or "") for part in parts if part.get("type") == "text")
    text = content if isinstance(content, str) else ""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class APIError(ConnectionError):
    """A model behind an API gave nothing; what it gave before is kept."""


def _is_spent(error: Any) -> bool:
    """Whether a rate limit is one that waiting does not lift."""
    return "insufficient_quota" in str(error) or "exceeded your current quota" in str(error)


def _wait_asked_for(error: Any) -> float:
    """The seconds of a `Retry-After`, in either of its two forms; 0 where there is none."""
    stated = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "").strip()
    try:
        return max(0.0, float(stated))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(stated)
    except (ValueError, TypeError, IndexError):
        return 0.0
    return max(0.0, until.timestamp() - time.time())


class APIWriter:
    """Asks one model, several requests at a time.

    Args:
        model: which.
        folder: where its replies are kept, `NAME.jsonl`, and what failed, `failed/NAME.jsonl`.
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
        loopback = urlsplit(model.base_url).hostname in LOOPBACK
        self._client = openai.OpenAI(
            base_url=model.base_url,
            api_key=self._secret or "none",
            max_retries=0,  # the tries are counted here
            timeout=model.timeout,
            http_client=openai.DefaultHttpxClient(trust_env=not loopback),  # no proxy stands before this machine itself
        )
        self._failed = folder / "failed" / f"{model.name}.jsonl"
        self._file = RowFile(folder / f"{model.name}.jsonl", "remove it, that reply is then asked for again")
        self._known = {row["hash"]: row for row in self._file.rows}
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._in_a_row = self._down_in_a_row = 0
        self.fresh = 0  # replies of this run

    def stop(self) -> None:
        """Ask nothing more; what is on its way is waited for and kept. For another thread than the one that asks."""
        self._stopped.set()

    def __call__(self, asked: Sequence[Asked], progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
        """The replies, in the order of the requests; one that failed after every try has no `text` and an `error`.

        Returns:
            rows with `hash`, `text`, `finish` (`length` of one that was cut), `prompt_tokens`, `completion_tokens`, `seconds`
            and, where it was asked for, `mean_log_prob`.

        Raises:
            APIError: no server answers, or the model refuses whoever asks; what came before is kept.
        """
        hashes = [each.hash(self.model) for each in asked]
        found = {key: self._known[key] for key in hashes if key in self._known}
        left = {key: each for key, each in zip(hashes, asked, strict=True) if key not in found}  # each once
        self._forget_failures(left)
        elsewhere = {row.get("base_url") for row in found.values()} - {self.model.base_url, None}
        if elsewhere:
            self.say(f"{self._who}: {len(found):,} replies are taken that came from {', '.join(sorted(map(str, elsewhere)))}")
        failures = 0
        for key, reply in self._asked(list(left.items())):
            found[key] = reply
            failures += "error" in reply
            if progress is not None:
                progress(len(found), len(set(hashes)))
        if failures:
            first = next(reply["error"] for reply in found.values() if "error" in reply)
            self.say(f"{self._who}: {failures:,} requests failed, e.g. {first}; they stand in {self._failed}")
        if self._stopped.is_set():
            raise APIError(f"{self._who} was asked no further; {len(self._known):,} replies are kept in {self._file.path}.")
        return [found[key] for key in hashes]

    def _asked(self, open_: Sequence[tuple[str, Asked]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Replies as they come; no more requests are in flight than the model takes at a time."""
        waiting = iter(open_)
        running: dict[Future, str] = {}
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            try:
                while True:
                    while len(running) < self.model.concurrency and not self._stopped.is_set():
                        following = next(waiting, None)
                        if following is None:
                            break
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
        began, tries = time.monotonic(), [0]
        try:
            reply = self._tried(asked, tries)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise APIError(self._refused(error)) from None
        except openai.NotFoundError as error:
            raise APIError(f"{self._who} has no model {self.model.model!r}, or is no such API: {self._told(error)}.") from None
        except openai.APIError as error:
            down = (
                isinstance(error, (openai.APIConnectionError, openai.RateLimitError)) or getattr(error, "status_code", 0) >= 500
            )
            told = self._told(error)
            self._keep_failure({"hash": key, "error": told, "tries": tries[0], "messages": [dict(m) for m in asked.messages]})
            with self._lock:
                self._in_a_row += 1
                self._down_in_a_row = self._down_in_a_row + 1 if down else 0
                gone = self._down_in_a_row >= DOWN_AFTER or self._in_a_row >= REFUSED_AFTER
            if gone or _is_spent(error) or _wait_asked_for(error) > LONGEST:
                many = f", after {self._in_a_row} failed requests in a row, the last one tried {tries[0]} times" if gone else ""
                kept = f"{len(self._known):,} replies are kept in {self._file.path}; start again and it goes on."
                raise APIError(f"{self._who} gives no more replies{many}: {told}. {kept}") from None
            return {"hash": key, "error": told, "tries": tries[0]}
        row = {
            "hash": key,
            "base_url": self.model.base_url,
            "sample": asked.sample,
            **reply,
            "seconds": round(time.monotonic() - began, 3),
        }
        self._file.add(row)
        with self._lock:
            self._in_a_row = self._down_in_a_row = 0
            self._known[key] = row
            self.fresh += 1
        return row

    def _tried(self, asked: Asked, tries: list[int]) -> dict[str, Any]:
        """A reply, after as many tries as the model has, which are counted."""
        import tenacity

        openai = self._openai
        again = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError, openai.ConflictError)

        def worth(error: BaseException) -> bool:
            passes = isinstance(error, again) or isinstance(error, openai.APIResponseValidationError)
            passes = passes or getattr(error, "status_code", 0) == 408
            return passes and not _is_spent(error) and _wait_asked_for(error) <= LONGEST

        growing = tenacity.wait_exponential(multiplier=self.pause, max=60 * self.pause)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(growing(state), _wait_asked_for(error)) + random.uniform(0, self.pause)

        def once() -> dict[str, Any]:
            tries[0] += 1
            return self._once(asked)

        return tenacity.Retrying(
            stop=tenacity.stop_any(tenacity.stop_after_attempt(self.model.tries), tenacity.stop_when_event_set(self._stopped)),
            sleep=tenacity.sleep_using_event(self._stopped),
            wait=pause,
            retry=tenacity.retry_if_exception(worth),
            reraise=True,
        )(once)

    def _once(self, asked: Asked) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.model.options)
        if self.model.log_probs:
            options["logprobs"] = True
        if "seed" in options:
            options["seed"] = options["seed"] + asked.sample
        messages: Any = [dict(message) for message in asked.messages]
        try:
            made = self._client.chat.completions.create(model=self.model.model, messages=messages, **options)
            choice, usage = made.choices[0], made.usage
            text = _text_of(choice.message.content)
            values = [token.logprob for token in (choice.logprobs.content if choice.logprobs else None) or ()]
        except self._openai.APIError:
            raise
        except (AttributeError, IndexError, TypeError, KeyError, ValueError) as error:  # half a reply, or of another shape
            nowhere: Any = None
            raise self._openai.APIConnectionError(message=f"the reply cannot be read ({error})", request=nowhere) from error
        row: dict[str, Any] = {"text": text, "finish": choice.finish_reason}
        for name in ("prompt_tokens", "completion_tokens"):  # None where the server does not say
            count = getattr(usage, name, None)
            row[name] = count if isinstance(count, int) and not isinstance(count, bool) else None
        numbers = [value for value in values if isinstance(value, (int, float))]
        return {**row, "mean_log_prob": sum(numbers) / len(numbers)} if numbers and len(numbers) == len(values) else row

    def _forget_failures(self, left: Mapping[str, Asked]) -> None:
        """What failed before and is asked again now, or has its reply, is no failure any more."""
        earlier = read_rows(self._failed, "remove it")
        kept = [row for row in earlier if row["hash"] not in self._known and row["hash"] not in left]
        if len(kept) < len(earlier):
            replace_rows(self._failed, kept)

    def _keep_failure(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._failed.parent.mkdir(parents=True, exist_ok=True)
            append_rows(self._failed, [row])

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

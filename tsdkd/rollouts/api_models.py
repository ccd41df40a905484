"""Models behind an OpenAI-compatible API as a YAML file names them, and what they are asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from tsdkd.checks import LOOPBACK
from tsdkd.provenance import redacted

_OPTIONS = ("temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty", "extra_body",
            "max_completion_tokens", "reasoning_effort", "n")  # fmt: skip


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
        for name in ("name", "base_url", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"{where}: {name}={getattr(self, name)!r} must be a text.")
        if any(c in "/\\" or not c.isprintable() for c in self.name) or self.name in (".", "..", "failed"):
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
        if parts.scheme == "http" and self.api_key_env and parts.hostname not in LOOPBACK:
            raise ValueError(f"{where}: its key would go over http unencrypted: use https.")
        for name, smallest in (("concurrency", 1), ("tries", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"{where}: {name}={value!r} must be a whole number of at least {smallest}.")
        if not _is_number(self.timeout) or not 0 < self.timeout < float("inf"):
            raise ValueError(f"{where}: timeout={self.timeout!r} must be seconds above 0.")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(self.api_key_env)):
            raise ValueError(f"{where}: api_key_env is no name of an environment variable; the key itself belongs into one.")
        if not isinstance(self.log_probs, bool):
            raise ValueError(f"{where}: log_probs={self.log_probs!r} must be true or false.")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"{where}: options={self.options!r} must be a mapping, e.g. {{temperature: 0.7}}.")
        for name in ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"):
            if name in self.options and not _is_number(self.options[name]):
                raise ValueError(f"{where}: {name}={self.options[name]!r} must be a number.")
        unknown = sorted(set(self.options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"{where}: the options {', '.join(unknown)} are unknown; there are: {', '.join(_OPTIONS)}.")
        if self.options.get("n", 1) != 1:
            raise ValueError(f"{where}: n={self.options['n']}: ask for several samples with `samples`, one reply each.")
        is_list = isinstance(self.price, Mapping) and set(self.price) == {"input", "output"}
        is_list = is_list and all(_is_number(value) and value >= 0 for value in self.price.values())
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
        stated = given.get("options") or {}
        if not isinstance(stated, Mapping):
            raise ValueError(
                f"the teacher {given.get('name')!r}: options={stated!r} must be a mapping, e.g. {{temperature: 0.7}}."
            )
        options = {**stated, **{name: given[name] for name in given if name in _OPTIONS}}
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

    def check(self) -> None:
        """Raise a ValueError where its key or its price would."""
        _ = self.key, self.cost(1, 1)

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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _listed_price(model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
    try:
        from genai_prices import Usage, calc_price
    except ImportError as error:
        raise ValueError("price: auto needs the package genai-prices: pip install genai-prices.") from error
    try:
        return float(calc_price(Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens), model).total_price)
    except LookupError:
        return None


@dataclass(frozen=True)
class Asked:
    """A request: chat messages, and which of several samples of them it is."""

    messages: Sequence[Mapping[str, str]]
    sample: int = 0

    def hash(self, model: APIModel) -> str:
        """What its reply is kept under."""
        text = json.dumps([model.settings, [dict(message) for message in self.messages], self.sample], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

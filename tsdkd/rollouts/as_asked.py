"""Generation as it was asked for, whatever a model's generation_config.json adds to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# What says which ids begin, end and pad a text; kept.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# Asked for in every call, or of no weight beside what is.
_ASKED = (
    *(*_IDS, *_SAMPLING),
    *("do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version"),
)
_ONE = re.compile("penalty$|^num_")  # where 1 is nothing


def leftovers(model: Any) -> dict[str, Any]:
    """What a model's generation_config would add to a generation that does not name it, beside sampling's own options."""
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(config, "to_diff_dict"):
        return {}
    found = {name: value for name, value in config.to_diff_dict().items() if name not in _ASKED and name[:1] != "_"}
    return {name: value for name, value in found.items() if value and not (value == 1 and _ONE.search(name))}


def _layers(model: Any) -> Iterator[Any]:
    """A model, and the one that an adapter's wrapper holds, which it lends its generation_config."""
    yield model
    if hasattr(model, "get_base_model"):
        yield model.get_base_model()


@contextmanager
def as_asked(*models: Any) -> Iterator[None]:
    """Generation by transformers without what the models' generation_config.json add (a repetition penalty, a top-k, ids that
    are suppressed), which vLLM does not read here either; which ids end a text stays. A mixture's router logits are off:
    their loss cannot be computed on a cache."""
    with ExitStack() as stack:
        for model in models:
            for layer in _layers(model):
                _neutral(layer, stack)
        yield


def _neutral(model: Any, stack: ExitStack) -> None:
    own = getattr(model, "generation_config", None)
    if own is not None and hasattr(own, "eos_token_id"):
        kept = {name: getattr(own, name) for name in _IDS if getattr(own, name, None) is not None}
        stack.callback(setattr, model, "generation_config", own)
        model.generation_config = type(own)(**kept)
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
        if getattr(part, "output_router_logits", False):
            stack.callback(setattr, part, "output_router_logits", True)
            part.output_router_logits = False

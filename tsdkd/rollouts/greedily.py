"""Completions by a model in this process, of prompts as ids: the likeliest, or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tsdkd.rollouts.as_asked import as_asked


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a model's completions."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set(ends if isinstance(ends, (list, tuple)) else [tokenizer.eos_token_id if ends is None else ends])


def written_greedily(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 250,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The likeliest token after another, to an end and with it, or to `max_new_tokens`.

    Args:
        prompt_ids: the prompts; the completions come in their order.
        batch_size: prompts at a time.
        progress: is told how many are written, and of how many.

    Returns:
        the completions' ids.
    """
    return _written(model, tokenizer, prompt_ids, max_new_tokens, batch_size, progress, do_sample=False)


def written_by_sampling(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 250,
    *,
    seed: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """The same, each token drawn from the model's whole distribution at a temperature; of a seed the same, whatever was drawn
    before, and what is drawn afterwards is as if this had not been."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return _written(model, tokenizer, prompt_ids, max_new_tokens, batch_size, None, **how)


@torch.no_grad()
def _written(model, tokenizer, prompt_ids, max_new_tokens, batch_size, progress, **how) -> list[list[int]]:
    ends = ends_of(model, tokenizer)
    written: list[list[int]] = []
    for start in range(0, len(prompt_ids), batch_size):
        ids = {"input_ids": [list(ids) for ids in prompt_ids[start : start + batch_size]]}
        inputs = tokenizer.pad(ids, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with as_asked(model):
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **how)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            written.append(row[: stop + 1])
        if progress is not None:
            progress(len(written), len(prompt_ids))
    return written

"""Whether vLLM, which writes the completions, and the trainer, which trains on them, mean the same model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tsdkd.preflight.findings import GREEN, RED, YELLOW, Finding
from tsdkd.teachers.heads import head_of
from tsdkd.trainers.engine_scores import written_and_scored
from tsdkd.types import Rollouts, TokenBatch

HEALTHY, BROKEN = 5e-3, 0.1  # nats a token; a dense model in bfloat16 has about 2e-4
DEEPER = 10.0  # times the mean: a number that grows with the depth of the context points at positions
_TOKENS = 128


def coarse_kl(theirs: Mapping[int, float], ours: torch.Tensor) -> float:
    """KL of one distribution from another, of which some tokens are known and the rest is taken together: never above the whole
    KL, and near it where the known hold the mass.

    Args:
        theirs: log p by token, of the likeliest tokens.
        ours: log p `[vocabulary]`.

    Example:
        >>> half = math.log(0.5)
        >>> uneven = torch.tensor([0.25, 0.75]).log()
        >>> round(coarse_kl({0: half}, torch.tensor([half, half])), 9), round(coarse_kl({0: half}, uneven), 4)
        (0.0, 0.1438)
    """
    ids = torch.tensor(sorted(theirs))
    p = torch.tensor([theirs[i] for i in ids.tolist()], dtype=torch.float64)
    q = ours.double().cpu()[ids]
    kl = (p.exp() * (p - q)).sum().item()
    rest, own = 1.0 - p.exp().sum().item(), 1.0 - q.exp().sum().item()
    if rest > 1e-9:
        kl += rest * math.log(rest / max(own, 1e-12))
    return max(kl, 0.0)


def depths(places: Sequence[int], values: Sequence[float]) -> list[tuple[int, int, float]]:
    """Means by how deep in the context: (from, to, mean), each range as long as all before it.

    Example:
        >>> depths([3, 20, 40, 70], [1.0, 3.0, 5.0, 7.0])
        [(0, 32, 2.0), (32, 64, 5.0), (64, 128, 7.0)]
    """
    made, start, stop = [], 0, 32
    while any(place >= start for place in places):
        here = [value for place, value in zip(places, values, strict=True) if start <= place < stop]
        if here:
            made.append((start, stop, sum(here) / len(here)))
        start, stop = stop, 2 * stop
    return made


def engine(trainer: Any, prompt_ids: Sequence[list[int]], batches_of: Any) -> Iterator[Finding]:
    """KL(vLLM ‖ trainer) on completions that vLLM writes now, with the student's weights of now, by depth of the context."""
    tokens = min(_TOKENS, trainer.loop.prompts.limits.completion)
    try:
        ids, scores = written_and_scored(trainer.generation.vllm, prompt_ids, tokens)
    except Exception as error:  # of an engine or a server, of any kind
        said = f"it does not write: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        yield Finding(RED, "vLLM", said, "look at its own log")
        return
    kept = [row for row, written in enumerate(ids) if written]
    rollouts = Rollouts(
        [list(prompt_ids[row]) for row in kept], [ids[row] for row in kept], [[1] * len(ids[row]) for row in kept]
    )
    places, values = [], []
    for row, batch in zip(kept, batches_of(trainer, rollouts), strict=True):
        ours = _log_probs(trainer, batch)
        for place, theirs in enumerate(scores[row]):
            places.append(len(prompt_ids[row]) + place)
            values.append(coarse_kl(theirs, ours[place]))
    if not values:
        yield Finding(YELLOW, "vLLM", "every completion of its is empty: nothing could be compared", "look at the prompts")
        return
    yield told(places, values)


def told(places: Sequence[int], values: Sequence[float]) -> Finding:
    """The finding of KLs at places of the context."""
    mean, deep = sum(values) / len(values), depths(places, values)
    by_depth = ", ".join(f"{value:.1e} at {start}-{stop}" for start, stop, value in deep)
    said = f"KL(vLLM, trainer) is {mean:.1e} nats over {len(values)} tokens ({by_depth} of the context)"
    if not math.isfinite(mean) or mean > BROKEN:
        do = "they are two models: do the weights reach vLLM, is it the same checkpoint, dtype, chat template, RoPE scaling?"
        return Finding(RED, "vLLM", said, do)
    if mean > HEALTHY:
        do = "a dense model in bfloat16 has about 2e-4: try vLLM in the student's dtype, without quantization of its cache"
        return Finding(YELLOW, "vLLM", said, do)
    if len(deep) > 1 and deep[-1][2] > max(DEEPER * deep[0][2], HEALTHY / 5):
        return Finding(YELLOW, "vLLM", said, "it grows with depth: compare RoPE scaling and sliding windows of the two")
    return Finding(GREEN, "vLLM", said)


@torch.no_grad()
def _log_probs(trainer: Any, batch: TokenBatch) -> torch.Tensor:
    """The trainer's log p at each token, of the ids that may be sampled."""
    head, size = head_of(trainer.model), trainer.vocab_size
    lost = torch.tensor(trainer.unknown_ids, dtype=torch.long)
    made = []
    for start in range(0, batch.student_hidden.shape[0], 64):
        logits = head.logits(batch.student_hidden[start : start + 64]).float().cpu()[:, :size]
        logits[:, lost] = -math.inf
        made.append(logits.log_softmax(-1))
    return torch.cat(made)

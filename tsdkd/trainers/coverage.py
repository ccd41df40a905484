"""What is logged of a micro-batch beside its loss, from a few of its tokens: how much of what the student would write the
teacher would, too; where completions end; how far the student is from what its completions were drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.fused import shared_heads
from tsdkd.trainers.endings import end_probability
from tsdkd.trainers.step import Step
from tsdkd.types import Head, TokenBatch

BEST = 10  # of the teacher's tokens: the candidates of TSD-KD
LOG_PROB = "rollout_log_prob"  # of each token as it was drawn, among what is recorded of completions
_TOKENS, _EVERY = 64, 16  # no more of a micro-batch, and no more than one of so many, spread evenly


@dataclass(frozen=True)
class Beside:
    """All of it.

    Args:
        ends: the ids that end a completion.
        engine: gives what writes one step ahead (`one_ahead.Engine`); None where nothing does.
    """

    ends: Sequence[int]
    engine: Callable[[], Any] = lambda: None

    def __call__(
        self, step: Step, batch: TokenBatch, student: Head, teacher: Head | None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sums and counts of a micro-batch with these heads."""
        sizes, engine = (batch.lengths, step.rollouts.lengths), self.engine()
        found = {**end_probability(batch.student_hidden, *sizes, student, self.ends), **coverage(batch, student, teacher)}
        if engine is not None and LOG_PROB in batch.recorded and engine.temperature:
            found |= drift(batch, student, engine.temperature, engine.allowed)
        return found


@torch.no_grad()
def drift(
    batch: TokenBatch, student: Head, temperature: float, allowed: Sequence[int] | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`rollout/kl`, the KL divergence of what the completions were drawn from and the student of now, per token.

    Formula: the mean over tokens of `r − 1 − log r`, `r` the probability of now by that of then: unbiased where tokens were
    drawn from the whole distribution, and never negative. Of every sixteenth token, no more than 64 of a micro-batch.

    Args:
        temperature: of the log-probabilities that were recorded.
        allowed: the ids that could be drawn; None: all.

    References:
        Schulman 2020, "Approximating KL divergence" (k3).
    """
    where = torch.arange(len(batch.student_hidden), device=batch.student_hidden.device)
    where = where[:: max(_EVERY, -(-len(where) // _TOKENS))]
    assert batch.token_ids is not None
    logits = student.logits(batch.student_hidden[where]).float() / temperature
    if allowed is not None:
        barred = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        barred[torch.tensor(allowed, dtype=torch.long, device=logits.device)] = False
        logits = logits.masked_fill(barred, float("-inf"))
    now = logits.log_softmax(-1).gather(-1, batch.token_ids[where].unsqueeze(-1)).squeeze(-1)
    change = now - batch.recorded[LOG_PROB][where].float()
    return {"rollout/kl": ((change.exp() - 1 - change).sum(), torch.tensor(float(len(where)), device=logits.device))}


@torch.no_grad()
def coverage(batch: TokenBatch, student: Head, teacher: Head | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`teacher/coverage`, the student's probability of the teacher's ten best tokens, as a sum over tokens and their number.

    Of every sixteenth token that the teacher was read at, no more than 64 of a micro-batch, since both heads are projected for
    them. Nothing without a teacher, or with one of another tokenizer.
    """
    if teacher is None or batch.teacher_hidden is None or batch.paired is not None:
        return {}
    readable = batch.readable()
    where = torch.arange(len(batch.student_hidden), device=batch.student_hidden.device)
    if readable is not None:
        where = where[readable[batch.mask()]]
    where = where[:: max(_EVERY, -(-len(where) // _TOKENS))]
    student, both = shared_heads(student, teacher)
    assert both is not None
    best = both.logits(batch.teacher_hidden[where]).topk(min(BEST, both.size), -1).indices
    found = student.logits(batch.student_hidden[where]).float().softmax(-1).gather(-1, best).sum()
    return {"teacher/coverage": (found, torch.tensor(float(len(where)), device=found.device))}

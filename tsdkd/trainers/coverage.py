"""How much of what the student would write the teacher would, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.fused import shared_heads
from tsdkd.trainers.endings import end_probability
from tsdkd.trainers.step import Step
from tsdkd.types import Head, TokenBatch

BEST = 10  # of the teacher's tokens: the candidates of TSD-KD
_TOKENS, _EVERY = 64, 16  # no more of a micro-batch, and no more than one of so many, spread evenly


def beside(
    step: Step, batch: TokenBatch, student: Head, teacher: Head | None, ends: Sequence[int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What is logged of a micro-batch beside its loss, from a few tokens of it."""
    sizes = batch.lengths, step.rollouts.lengths
    return {**end_probability(batch.student_hidden, *sizes, student, ends), **coverage(batch, student, teacher)}


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

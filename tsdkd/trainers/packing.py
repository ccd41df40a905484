"""From a micro-batch to what a loss is computed of: one pass of the student, and each teacher's rows as a `TokenBatch`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tsdkd.trainers.step import Step
from tsdkd.types import LossTerms, Rollouts, TokenBatch


def _read(step: Step) -> Rollouts:
    """As far as the student reads."""
    return step.rollouts.first(step.plan.student) if step.plan.is_cut else step.rollouts


def hidden_states(
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], step: Step, pad_id: int, device: torch.device
) -> torch.Tensor:
    """`[all tokens, hidden]`, the student's hidden states that predict the rows' trained tokens, row by row; of one pass.

    Args:
        read: from ids and mask to the last hidden states, `[rows, longest, hidden]`.
    """
    rollouts = _read(step)
    ids, mask, where = rollouts.padded(pad_id, device)
    return read(ids, mask).flatten(0, 1)[where]


def packed(hidden: torch.Tensor, step: Step, device: torch.device) -> TokenBatch:
    """The student's hidden states of a step's rows, `[all tokens, hidden]`, and beside them what their teacher gave."""
    rollouts = _read(step)
    lengths, teacher = rollouts.lengths, None
    if step.teacher_hidden is not None:  # zeros stand where the teacher did not read
        parts = zip(step.teacher_hidden, lengths, strict=True)
        teacher = torch.cat([nn.functional.pad(part.to(device), (0, 0, 0, n - len(part))) for part, n in parts])
    return TokenBatch(
        hidden,
        teacher,
        tuple(lengths),
        token_ids=torch.tensor(rollouts.trained(rollouts.completion_ids), dtype=torch.long, device=device),
        rows=tuple(step.rows),
        recorded={name: torch.tensor(rollouts.trained(column), device=device) for name, column in rollouts.recorded.items()},
        plan=step.plan,
    )


def by_teacher(hidden: torch.Tensor, step: Step, device: torch.device) -> list[tuple[Step, TokenBatch]]:
    """Each teacher's rows as a step of their own, in units of the same whole step; with one teacher the step itself."""
    groups = step.by_teacher()
    if len(groups) == 1:
        return [(step, packed(hidden, step, device))]
    by_row = hidden.split(_read(step).lengths)
    steps = [(step.some(rows), rows) for _, rows in groups]
    return [(part, packed(torch.cat([by_row[row] for row in rows]), part, device)) for part, rows in steps]


def of_teacher(name: str, terms: LossTerms) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One of several teachers' own part of what is logged."""
    kept = ("loss/", "teacher/entropy", "candidates/")
    return {f"teacher/{name}/{key.removeprefix('teacher/')}": pair for key, pair in terms.sums.items() if key.startswith(kept)}

"""From a micro-batch to what a loss is computed of: one pass of the student, and each teacher's rows as a `TokenBatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tsdkd.teachers import hidden_of
from tsdkd.teachers.batches import Batches, check_padding_free, laid
from tsdkd.trainers.step import Step
from tsdkd.types import LossTerms, Rollouts, TokenBatch


def _read(step: Step) -> Rollouts:
    """As far as the student reads."""
    return step.rollouts.first(step.plan.student) if step.plan.is_cut else step.rollouts


def hidden_states(
    read: Callable[..., torch.Tensor], step: Step, pad_id: int, device: torch.device, padding_free: bool = False
) -> torch.Tensor:
    """`[all tokens, hidden]`, the student's hidden states that predict the rows' trained tokens, row by row; of one pass.

    Args:
        read: from ids, mask and `Rollouts.beside` to the last hidden states, `[rows, longest, hidden]`; with `padding_free`
            from all rows in one, without a mask, and their positions.
    """
    inputs, more, where = laid(_read(step), padding_free, pad_id, device)
    return read(*inputs, **more).flatten(0, 1)[where]


def check_packing(trainer: Any) -> None:
    """Refuse a student whose rows see each other without padding.

    Raises:
        ValueError: naming it.
    """
    model, accelerator = trainer.model, trainer.accelerator

    def read(rollouts: Rollouts, batches: Batches) -> list[torch.Tensor]:
        return hidden_of(model, rollouts, 0, batches, accelerator.device, accelerator.autocast)

    was_training = model.training
    model.eval()
    low = bool(trainer.args.bf16 or trainer.args.fp16) or next(model.parameters()).dtype.itemsize < 4
    check_padding_free(read, "student", model, trainer.vocab_size, low)
    model.train(was_training)


def packed(hidden: torch.Tensor, step: Step, device: torch.device) -> TokenBatch:
    """The student's hidden states of a step's rows, `[all tokens, hidden]`, and beside them what their teacher gave."""
    rollouts = _read(step)
    lengths, teacher = rollouts.lengths, None
    if step.teacher_hidden is not None:  # zeros stand where the teacher did not read
        at = step.plan.pairs or [None] * len(lengths)
        parts = zip(step.teacher_hidden, lengths, at, strict=True)
        teacher = torch.cat([_laid(part.to(device), n, where) for part, n, where in parts])
    return TokenBatch(
        hidden,
        teacher,
        tuple(lengths),
        token_ids=torch.tensor(rollouts.trained(rollouts.completion_ids), dtype=torch.long, device=device),
        rows=tuple(step.rows),
        recorded={name: torch.tensor(rollouts.trained(column), device=device) for name, column in rollouts.recorded.items()},
        plan=step.plan,
    )


def _laid(states: torch.Tensor, length: int, where: Sequence[int] | None) -> torch.Tensor:
    """A completion's states at its first tokens, or at those that are named; zeros elsewhere."""
    if where is None:
        return nn.functional.pad(states, (0, 0, 0, length - len(states)))
    laid = states.new_zeros(length, states.shape[-1])
    laid[torch.tensor(where, dtype=torch.long, device=laid.device)] = states
    return laid


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
    kept = ("loss/", "teacher/", "candidates/")
    return {f"teacher/{name}/{key.removeprefix('teacher/')}": pair for key, pair in terms.sums.items() if key.startswith(kept)}

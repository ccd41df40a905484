"""An optimizer step as it travels through TRL's batch: the only place that knows the batch's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tsdkd.types import Counts, ReadPlan, Rollouts

_PREFIX = "tsdkd_"
_COUNT = f"{_PREFIX}count/"
_RECORDED = f"{_PREFIX}recorded/"
_EXTRA = f"{_PREFIX}extra/"


@dataclass(frozen=True)
class Step:
    """The rollouts of a step or of one of its micro-batches, and what was known of them before the student reads.

    Args:
        rollouts: prompts and completions.
        counts: the whole step's, over all processes.
        rows: a number of each completion that no batching changes.
        plan: how much of each completion the models read.
        teacher_hidden: for each completion `[plan.teacher, hidden_t]`; None where no term reads the teacher.
        extra: more of each row, by name, a list each (a corpus's ids).
    """

    rollouts: Rollouts
    counts: Counts
    rows: Sequence[int]
    plan: ReadPlan
    teacher_hidden: Sequence[torch.Tensor] | None = None
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def to_trl(self) -> dict[str, Any]:
        """Entries for TRL's batch: it shuffles and splits lists with their rows and passes 0-d tensors through."""
        per_row: dict[str, Any] = {
            "prompts": self.rollouts.prompt_ids,
            "completions": self.rollouts.completion_ids,
            "masks": self.rollouts.completion_mask,
            "rows": list(self.rows),
            "student_prefix": list(self.plan.student),
            "teacher_prefix": list(self.plan.teacher),
        }
        if self.rollouts.teacher_prompt_ids is not None:
            per_row["teacher_prompts"] = self.rollouts.teacher_prompt_ids
        if self.rollouts.teachers is not None:
            per_row["teachers"] = self.rollouts.teachers
        if self.plan.pairs is not None:
            per_row["pairs"] = list(self.plan.pairs)
        if self.rollouts.vision is not None:
            per_row["vision"] = self.rollouts.vision
        if self.teacher_hidden is not None:
            per_row["teacher_hidden"] = list(self.teacher_hidden)
        batch = {_PREFIX + name: column for name, column in per_row.items()}
        batch.update({_RECORDED + name: column for name, column in self.rollouts.recorded.items()})
        batch.update({_EXTRA + name: list(column) for name, column in self.extra.items()})
        batch.update({_COUNT + name: torch.as_tensor(value) for name, value in self.counts.to_dict().items()})
        return batch

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Step:
        """The step or micro-batch that a batch of TRL's holds."""
        column = lambda name: batch[_PREFIX + name]  # noqa: E731
        part = lambda prefix: {key[len(prefix) :]: value for key, value in batch.items() if key.startswith(prefix)}  # noqa: E731
        written = column("completions"), column("masks"), part(_RECORDED)
        theirs = (batch.get(_PREFIX + name) for name in ("teacher_prompts", "teachers", "vision"))
        rollouts = Rollouts(column("prompts"), *written, *theirs)
        pairs = batch.get(_PREFIX + "pairs")
        plan = ReadPlan(
            tuple(rollouts.lengths),
            tuple(column("student_prefix")),
            tuple(column("teacher_prefix")),
            pairs=None if pairs is None else tuple(pairs),
        )
        hidden = batch.get(_PREFIX + "teacher_hidden")
        return cls(rollouts, Counts.from_dict(part(_COUNT)), column("rows"), plan, hidden, part(_EXTRA))

    def by_teacher(self) -> list[tuple[str | None, list[int]]]:
        """Each teacher's rows, where there are several; else all."""
        names = self.rollouts.teachers
        if names is None:
            return [(None, list(range(len(self.rollouts))))]
        return [(name, [row for row, whose in enumerate(names) if whose == name]) for name in dict.fromkeys(names)]

    def some(self, index: Sequence[int]) -> Step:
        """Some of the rows, in units of the same whole step."""
        hidden = None if self.teacher_hidden is None else [self.teacher_hidden[row] for row in index]
        extra = {name: [column[row] for row in index] for name, column in self.extra.items()}
        rows = [self.rows[row] for row in index]
        return Step(self.rollouts.rows(index), self.counts, rows, self.plan.rows(index), hidden, extra)

    @staticmethod
    def by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches again, of rows of like length, the longest first (a lack of memory shows at once).

        The loss does not depend on the split, so this only saves the padding that unlike rows would cost each other. Every
        entry of TRL's batch goes with its row; where one is not a row a completion (image patches), TRL's split stays.
        """
        prompts = _PREFIX + "prompts"
        sizes = [len(batch[prompts]) for batch in batches]
        if len(set(sizes)) > 1 or not all(_by_row(batch, size) for batch, size in zip(batches, sizes, strict=True)):
            return batches
        size, whole = sizes[0], {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
        lengths = [len(p) + len(c) for p, c in zip(whole[prompts], whole[_PREFIX + "completions"], strict=True)]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        parts = [order[i * size : (i + 1) * size] for i in range(len(batches))]
        return [{key: _rows_of(value, part) for key, value in whole.items()} for part in parts]


def _is_row_wise(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)


def _by_row(batch: Mapping[str, Any], rows: int) -> bool:
    """Whether every entry of a batch has an element a row, or none."""
    return all(len(value) == rows for value in batch.values() if _is_row_wise(value))


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [element for value in values for element in value]
    return torch.cat(values) if _is_row_wise(values[0]) else values[0]


def _rows_of(value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, list):
        return [value[row] for row in rows]
    return value[list(rows)] if _is_row_wise(value) else value

"""Several teachers, each of its own rows: each reads the rows that name it, wherever it lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsdkd.types import Head, Rollouts


class SeveralTeachers:
    """Teachers by name; the rows of a step are grouped by theirs, and each reads its group.

    Args:
        teachers: by name, each a `Teacher`. Widths, vocabularies and places may differ.
        most: from a number to the largest of it over all processes, for a teacher in shares, which all processes must ask
            alike often; it is asked of every process once a teacher.
        time: a context whose seconds are counted under a name.
        room: a context around all of them, in which the student has given up its part of the device's memory.
    """

    writes = "not"

    def __init__(
        self,
        teachers: Mapping[str, Any],
        most: Callable[[int], int] = int,
        time: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
        room: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.teachers, self.most, self.time, self.room = dict(teachers), most, time, room
        self.is_remote = any(teacher.is_remote for teacher in self.teachers.values())

    def head_of(self, name: str) -> Head:
        """One teacher's head."""
        return self.teachers[name].head

    @property
    def head(self) -> Head:
        """There is none of all: see `head_of`."""
        raise ValueError(f"of several teachers ({', '.join(self.teachers)}) each has a head of its own.")

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(rollouts)
        with self.room():
            self._fill(hidden, rollouts, lengths)
        return hidden

    def _fill(self, hidden: list[torch.Tensor], rollouts: Rollouts, lengths: Sequence[int]) -> None:
        assert rollouts.teachers is not None
        for name, teacher in self.teachers.items():
            rows = [row for row, whose in enumerate(rollouts.teachers) if whose == name]
            own, wanted = rollouts.rows(rows), [lengths[row] for row in rows]
            lacking = self.most(len(rows)) - len(rows)  # rows that are read so that all processes read as many
            if lacking:
                own, wanted = _with_empty(own, lacking), wanted + [0] * lacking
            with self.time(name):
                found = teacher.hidden(own, wanted)
            for row, states in zip(rows, found, strict=False):
                hidden[row] = states

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()


def _with_empty(rollouts: Rollouts, count: int) -> Rollouts:
    """The rollouts and rows behind them of which nothing is trained on."""
    extra = [[0]] * count
    columns = rollouts.prompt_ids + extra, rollouts.completion_ids + extra, rollouts.completion_mask + extra
    return Rollouts(*columns, vision=rollouts.vision and rollouts.vision + [{}] * count)

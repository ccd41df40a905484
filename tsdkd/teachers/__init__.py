"""Where the teacher lives. Every teacher reads a step's rollouts at once and gives hidden states of the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tsdkd.teachers.heads import head_of, vocabulary_size
from tsdkd.teachers.local import LocalTeacher, hidden_of
from tsdkd.teachers.recorded import RecordedTeacher, Recording
from tsdkd.teachers.server import ServerTeacher, TeacherUnavailable
from tsdkd.teachers.zero3 import ZeRO3Teacher, gathered
from tsdkd.types import Head, Rollouts


class Teacher(Protocol):
    """What a trainer asks of a teacher.

    Attributes:
        writes: whether it can write completions: `"not"`, `"whole"` (completions of its own) or `"interleaved"` (those, and
            token by token with the student).
        is_remote: it may fail for a while, and not on every process.
    """

    writes: str
    is_remote: bool

    @property
    def head(self) -> Head:
        """The teacher's head, on the device where the loss is computed."""
        ...

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Its forward pass: for each row `[length, hidden_t]`, without gradient, the hidden states that predict the first
        `length` trained tokens. Called once an optimizer step on every process, also where one has nothing to train on."""
        ...

    def close(self) -> None:
        """Give back what dropping the object would not free."""
        ...


__all__ = [
    "LocalTeacher",
    "RecordedTeacher",
    "Recording",
    "ServerTeacher",
    "Teacher",
    "TeacherUnavailable",
    "ZeRO3Teacher",
    "gathered",
    "head_of",
    "hidden_of",
    "vocabulary_size",
]

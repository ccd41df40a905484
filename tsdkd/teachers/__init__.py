"""Where the teacher lives. Every teacher scores a step's rollouts at once and gives hidden states of the trained tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from tsdkd.teachers.local import LocalTeacher, hidden_of
from tsdkd.teachers.recorded import RecordedTeacher, Recording
from tsdkd.teachers.zero3 import ZeRO3Teacher, gathered
from tsdkd.types import Head, Rollouts


class Teacher(Protocol):
    """What a trainer asks of a teacher."""

    @property
    def head(self) -> Head:
        """The teacher's head, on the device where the loss is computed."""
        ...

    def score(self, rollouts: Rollouts) -> list[torch.Tensor]:
        """For each row `[L, hidden_t]`, the hidden states that predict its trained tokens, without gradient."""
        ...


__all__ = ["LocalTeacher", "RecordedTeacher", "Recording", "Teacher", "ZeRO3Teacher", "gathered", "hidden_of"]

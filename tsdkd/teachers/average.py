"""Several teachers as one: the weighted mean of their logits, of every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsdkd.types import Head, Rollouts


class AverageTeacher:
    """Teachers of one vocabulary that all read every row: `log p_T = Σ_i w_i log p_i + const`, the normalised geometric mean.

    It is a teacher like any other, since the mean of logits is a head on the hidden states side by side: `[V, Σ hidden_i]`, the
    heads times their weights, which is held once beside the teachers.

    Args:
        teachers: by name, each a `Teacher`.
        weights: of each, above 0; their sum counts as 1.
        time, room: as in `SeveralTeachers`.
    """

    writes = "not"

    def __init__(
        self,
        teachers: Mapping[str, Any],
        weights: Mapping[str, float],
        time: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
        room: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.teachers, self.time, self.room = dict(teachers), time, room
        self.weights = {name: weights[name] / sum(weights.values()) for name in self.teachers}
        self.is_remote = any(teacher.is_remote for teacher in self.teachers.values())
        self._head: Head | None = None

    @property
    def head(self) -> Head:
        """Of the mean, over the ids that all have; made once, since they are frozen.

        Raises:
            ValueError: a soft cap, whose logits are not linear in the hidden states.
        """
        if self._head is None:
            heads = {name: teacher.head for name, teacher in self.teachers.items()}
            capped = [name for name, head in heads.items() if head.softcap is not None]
            if capped:
                raise ValueError(f"the teacher {capped[0]} caps its logits, which have no mean in one head: leave it out.")
            size = min(head.size for head in heads.values())
            factors = {name: self.weights[name] * head.logit_scale for name, head in heads.items()}
            weight = torch.cat([head.weight[:size] * factors[name] for name, head in heads.items()], 1)
            biases = [head.bias[:size] * factors[name] for name, head in heads.items() if head.bias is not None]
            self._head = Head(weight, sum(biases[1:], biases[0]) if biases else None)
        return self._head

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        each = []
        with self.room():
            for name, teacher in self.teachers.items():
                with self.time(name):
                    each.append(teacher.hidden(rollouts, lengths))
        rows = zip(*each, strict=True)
        return [torch.cat([states.to(row[0].device) for states in row], -1) for row in rows]

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

"""Two tokenizers' vocabularies, and which of their tokens are the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """The tokens that two models share under different ids.

    Args:
        student, teacher: `[M]` each, long: the ids of the same M tokens, in one order, no id twice.
        tokens: how many tokens the teacher's tokenizer has.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    tokens: int

    def __post_init__(self) -> None:
        ours, theirs = self.student.tolist(), self.teacher.tolist()
        if len(ours) != len(theirs) or len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):
            raise ValueError(f"a map pairs {len(ours)} ids with {len(theirs)}: each token has one id on either side, once.")

    @property
    def share(self) -> float:
        """Of the teacher's tokens, those that the student has."""
        return len(self.teacher) / max(1, self.tokens)

"""What a method states: its loss, its terms and their weights, and the counts that normalise them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tsdkd.types import Counts, Head, LossTerms, TokenBatch


@runtime_checkable
class Method(Protocol):
    """A token-level distillation method, blind to trainers; any object with these members is one.

    Attributes:
        name: how a config names it; an attribute `title`, where there is one, is its name in prose.
        paper: `title`, `id` (arXiv) and `citation` (BibTeX), for the model card.
    """

    name: str
    paper: dict[str, str]

    def counts(self, lengths: Sequence[int]) -> Counts:
        """What the terms are divided by, from the trained tokens of each response of a step."""
        ...

    def terms(self) -> dict[str, float]:
        """Each term's weight in the loss, by the name it is logged under."""
        ...

    def only(self, term: str) -> Method:
        """The same method with every other term's weight 0."""
        ...

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        """The loss of packed tokens; `engine` is handed to `fused.evaluate` (`impl`, `chunk_tokens`)."""
        ...

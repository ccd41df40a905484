"""Rules of which tokens count and how much, and divergences: functions of a user's own or named ones, wrapped once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.types.tokens import TokenStatistics

READS = ("lengths", "token", "student", "both")


@dataclass(frozen=True)
class Rule:
    """A gate or a selection: a function of `TokenStatistics` to `[completions, longest]`, and what it reads.

    Args:
        function: of a gate to weights, of a selection to a bool mask.
        reads: `"lengths"` (no statistics), `"token"` (its own token's, of both models), `"student"` (the student's
            statistics of the completion) or `"both"` (both models').
        count: of a selection whose size lengths alone tell, how many of a completion's `length` tokens it keeps.
        is_prefix: it keeps first tokens.
        prefix_length: of such a rule that reads lengths alone, how many of `length` tokens have to be read at all.
    """

    function: Callable[[TokenStatistics], torch.Tensor]
    reads: str
    count: Callable[[int], int] | None = None
    is_prefix: bool = False
    prefix_length: Callable[[int], int] | None = None

    @classmethod
    def of(cls, rule: Any, kind: str) -> Rule | None:
        """A rule from a function of `TokenStatistics`; None stays None.

        Its attribute `needs` says what it reads; a gate without one reads its own token, a selection both models'
        statistics of the completion. `count(length)`, `is_prefix` and `prefix_length(length)` are read likewise.

        Args:
            kind: `"gate"` or `"selection"`.

        Raises:
            ValueError: no function, or an unknown `needs`.
        """
        if rule is None or isinstance(rule, Rule):
            return rule
        if not callable(rule):
            raise ValueError(f"{kind}={rule!r}: a {kind} is a name or a function of tsdkd.TokenStatistics.")
        reads = getattr(rule, "needs", "token" if kind == "gate" else "both")
        if reads not in READS:
            raise ValueError(f"the {kind} {name_of(rule)} has needs={reads!r}; choose one of: {', '.join(READS)}.")
        if kind == "selection" and reads == "token":
            reads = "both"  # it is asked of all tokens before any is swept
        is_prefix, prefix_length = getattr(rule, "is_prefix", False), getattr(rule, "prefix_length", None)
        if prefix_length is not None and not (is_prefix and reads == "lengths"):
            raise ValueError(
                f"the {kind} {name_of(rule)} has a prefix_length, by which completions are cut before anything is known of "
                "them: it takes needs = 'lengths' and is_prefix = True."
            )
        count = None if isinstance(rule, tuple) else getattr(rule, "count", None)  # a tuple's own count is no rule's
        return cls(rule, reads, count, is_prefix, prefix_length)

    @property
    def is_own(self) -> bool:
        """Whether the function is a user's, of which nothing is known."""
        function = self.function
        module = getattr(function, "__module__", None) or type(function).__module__
        return not str(module).startswith("tsdkd.")

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        """What the function says, without gradient.

        Raises:
            ValueError: something else than a value for each token.
        """
        made = self.function(statistics if self.reads in ("both", "token") else statistics.of_student())
        if not isinstance(made, torch.Tensor) or made.shape != statistics.mask.shape:
            got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise ValueError(
                f"the rule {name_of(self.function)} gave {got} for statistics of shape {tuple(statistics.mask.shape)}: a gate "
                "gives a weight and a selection a bool for every token, [completions, longest]."
            )
        return made.detach()


@dataclass(frozen=True)
class Divergence:
    """A function of student and teacher logits, `[tokens, vocab]` each and divided by τ, to nats `[tokens]`.

    Args:
        function: the student's logits come first; differentiable in them.
        name: for messages and tables.
        keyword, parameter: an option that the function takes by this keyword, e.g. `beta`.
        own_vocabularies: each model's logits come whole, over the ids of its own tokenizer, and not cut to shared ids.
    """

    function: Callable[..., torch.Tensor]
    name: str
    keyword: str | None = None
    parameter: float | None = None
    own_vocabularies: bool = False

    def __call__(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        options = {} if self.keyword is None else {self.keyword: self.parameter}
        return self.function(student_logits, teacher_logits, **options)


def name_of(function: Any) -> str:
    """What a function or an object is called, for messages."""
    return getattr(function, "__name__", None) or type(function).__name__

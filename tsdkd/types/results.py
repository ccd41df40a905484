"""What comes of an objective: the loss, every term's part of it, and what is known of each token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from tsdkd.types.terms import DivergenceTerm, EntropyTerm, Number, RankingTerm, SampledTerm, Term
from tsdkd.types.tokens import TokenStatistics


@dataclass(frozen=True)
class TokenWeights:
    """What the rules decided; all `[completions, longest]`, no gradient.

    Attributes:
        gate: the divergence term's weight of each token, 0 where it is not `selected`.
        opener, top_entropy: True on the tokens of the ranking and of the entropy term.
        selected: True on the tokens of the divergence term.
    """

    gate: torch.Tensor
    opener: torch.Tensor
    top_entropy: torch.Tensor
    selected: torch.Tensor


@dataclass(frozen=True)
class TermResult:
    """What a term came to.

    Attributes:
        value: unweighted, divided by its count, 0-d; with gradient where the engine is `reference`.
        weight: the term's weight in the loss.
        tokens: `[completions, longest]` bool, which tokens it takes.
        weights: `[completions, longest]`, the gate's weight of each; 0 elsewhere.
        per_token: `[completions, longest]`, its value at each of its tokens, before the gate, without gradient; 0 elsewhere.
        tau: of a ranking, Kendall's tau of the student's against the teacher's order, in [-1, 1]; 0 off its tokens.
        kind: the term's class.
        coefficients: `[completions, longest]`, what `per_token` is multiplied by in the term's sum: the gate's weight, of a
            term that takes each completion's mean divided by the number of its tokens.
        divisor: what that sum is divided by.
    """

    value: torch.Tensor
    weight: float
    tokens: torch.Tensor
    weights: torch.Tensor
    per_token: torch.Tensor
    tau: torch.Tensor | None
    kind: type[Term]
    coefficients: torch.Tensor | None = None
    divisor: Number = 1.0

    @property
    def contribution(self) -> torch.Tensor:
        """`[completions, longest]`, each token's part of the loss; their sum is `weight · value`, without gradient."""
        coefficients = self.weights if self.coefficients is None else self.coefficients
        return self.weight * coefficients * self.per_token / max(float(self.divisor), 1.0)


@dataclass
class LossTerms:
    """The result of an objective.

    Attributes:
        loss: the weighted sum, 0-d.
        statistics: per token, `[completions, longest]`, without gradient.
        terms: each active term's result by its name.
        sums: for each logged quantity its sum and its count over these tokens (0-d, detached), so that a window of
            steps and processes is averaged exactly.

    `indirect`, `direct`, `entropy` and `sampled` are views: the value of the first ranking, divergence, entropy and
    sampled-token term, whatever its name; 0 where there is none.
    """

    loss: torch.Tensor
    statistics: TokenStatistics
    terms: dict[str, TermResult]
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def first(self, kind: type[Term]) -> TermResult | None:
        """The first active term of a kind."""
        return next((result for result in self.terms.values() if issubclass(result.kind, kind)), None)

    def _value(self, kind: type[Term]) -> torch.Tensor:
        found = self.first(kind)
        return self.statistics.student_entropy.new_zeros(()) if found is None else found.value

    def _per_token(self, kind: type[Term], name: str) -> torch.Tensor:
        """A member of the first term of a kind; zeros (of the mask's type for masks) where there is none."""
        found = self.first(kind)
        member = None if found is None else getattr(found, name)
        if member is None:
            like = self.statistics.mask if name == "tokens" else self.statistics.student_entropy
            return torch.zeros_like(like)
        return member

    @property
    def indirect(self) -> torch.Tensor:
        return self._value(RankingTerm)

    @property
    def direct(self) -> torch.Tensor:
        return self._value(DivergenceTerm)

    @property
    def entropy(self) -> torch.Tensor:
        return self._value(EntropyTerm)

    @property
    def sampled(self) -> torch.Tensor:
        return self._value(SampledTerm)

    @property
    def weights(self) -> TokenWeights:
        """What the rules of the first term of each kind decided."""
        return TokenWeights(
            gate=self.gate, opener=self.opener_mask, top_entropy=self.top_entropy_mask, selected=self.selected_mask
        )

    @property
    def mask(self) -> torch.Tensor:
        """True where a trained token stands."""
        return self.statistics.mask

    @property
    def opener_mask(self) -> torch.Tensor:
        """True on the tokens of the ranking term."""
        return self._per_token(RankingTerm, "tokens")

    @property
    def top_entropy_mask(self) -> torch.Tensor:
        """True on the tokens of the entropy term."""
        return self._per_token(EntropyTerm, "tokens")

    @property
    def selected_mask(self) -> torch.Tensor:
        """True on the tokens of the divergence term."""
        return self._per_token(DivergenceTerm, "tokens")

    @property
    def gate(self) -> torch.Tensor:
        """The divergence term's weight of each token."""
        return self._per_token(DivergenceTerm, "weights")

    @property
    def ranking_nll(self) -> torch.Tensor:
        """The Plackett-Luce loss of every token of the ranking term, nats; 0 elsewhere."""
        return self._per_token(RankingTerm, "per_token")

    @property
    def candidate_tau(self) -> torch.Tensor:
        """Kendall's tau of the candidates' two orders, in [-1, 1]; 0 off the ranking term's tokens."""
        return self._per_token(RankingTerm, "tau")

    @property
    def student_entropy(self) -> torch.Tensor:
        return self.statistics.student_entropy

    @property
    def teacher_entropy(self) -> torch.Tensor | None:
        return self.statistics.teacher_entropy

    @property
    def divergence(self) -> torch.Tensor | None:
        return self.statistics.divergence

    def spread(self, mask: torch.Tensor) -> LossTerms:
        """The per-token members laid out on another mask with as many True in the same order; 0 elsewhere."""

        def lay(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.new_zeros(mask.shape).masked_scatter_(mask, value[self.mask])
            if isinstance(value, (TokenStatistics, TermResult)):
                members = {member.name: lay(getattr(value, member.name)) for member in dataclasses.fields(value)}
                return dataclasses.replace(value, **members)
            return value

        laid = {name: lay(result) for name, result in self.terms.items()}
        return dataclasses.replace(self, statistics=lay(self.statistics), terms=laid)

"""What an engine computes: terms, the objective they make, and the counts they are divided by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tsdkd.types.rules import Divergence, Rule, name_of

Number = torch.Tensor | float


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a loss: a value for each token, which tokens it takes, how they are weighed, what they are divided by.

    The divisor is the number of tokens taken, where lengths tell it; else each completion gives the mean over its own
    tokens and the divisor is the number of completions with a token. Both are known for a whole optimizer step before any
    forward pass, so the loss does not depend on how the step is split.

    Args:
        name: what it is logged under.
        weight: in the loss; a term of weight 0 is off and costs nothing.
        selection: which tokens, a rule or a function of `TokenStatistics` to a bool mask; None is all.
        gate: how they are weighed, likewise to weights; None is 1.
    """

    name: str
    weight: float = 1.0
    selection: Any = None  # wrapped as a Rule
    gate: Any = None

    reads_teacher: ClassVar[bool] = True  # the teacher's scores or its distribution

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight):
            raise ValueError(
                f"the term {self.name} has weight={self.weight!r}: a weight is a finite number; 0 switches it off."
            )
        object.__setattr__(self, "selection", Rule.of(self.selection, "selection"))
        object.__setattr__(self, "gate", Rule.of(self.gate, "gate"))

    @property
    def rules(self) -> list[tuple[str, Rule]]:
        """Its rules and their kinds."""
        both = (("selection", self.selection), ("gate", self.gate))
        return [(kind, rule) for kind, rule in both if rule is not None]

    @property
    def per_completion(self) -> bool:
        """Whether each completion gives the mean over its own tokens, and the divisor is the number of completions."""
        return self.selection is not None and self.selection.count is None

    def divisor(self, lengths: Sequence[int]) -> int:
        """What the sum is divided by, from the trained tokens of each completion of a step."""
        if self.per_completion:
            return sum(length > 0 for length in lengths)
        kept = self.kept(lengths)
        assert kept is not None
        return kept

    def kept(self, lengths: Sequence[int]) -> int | None:
        """How many tokens it takes, where lengths tell."""
        if self.selection is None:
            return sum(lengths)
        count = self.selection.count
        return None if count is None else sum(count(length) for length in lengths if length)


@dataclass(frozen=True, kw_only=True)
class DivergenceTerm(Term):
    """A divergence between the two next-token distributions of each token: a `Divergence`, as `losses.resolve_divergence` makes
    one of a name, or a function."""

    divergence: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.divergence, Divergence):
            return
        if not callable(self.divergence):
            raise ValueError(
                f"the term {self.name} has divergence={self.divergence!r}: pass losses.resolve_divergence of a name, or a "
                "function of two logit tensors."
            )
        object.__setattr__(self, "divergence", Divergence(self.divergence, name_of(self.divergence)))


@dataclass(frozen=True, kw_only=True)
class RankingTerm(Term):
    """The Plackett-Luce loss of the teacher's order of the student's best tokens (`losses.plackett_luce_nll`).

    Args:
        num_candidates: k, how many tokens the student proposes.
        stage_weights: `"uniform"` or `"teacher_mass"`.
    """

    num_candidates: int = 10
    stage_weights: str = "uniform"

    @property
    def per_completion(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class EntropyTerm(Term):
    """The student's entropy (`losses.entropy_penalty`); `target` is `"zero"` or `"teacher"`."""

    target: str = "zero"

    reads_teacher = False


@dataclass(frozen=True, kw_only=True)
class SampledTerm(Term):
    """A loss of the log-probabilities of the tokens that were written; it needs `TokenBatch.token_ids`.

    Args:
        function: maps log p_S(y_t) of some tokens and the slice of them to the loss of each, `[tokens]`. None: known by
            name and weight alone; an engine refuses it.
    """

    function: Callable[[torch.Tensor, slice], torch.Tensor] | None = None

    reads_teacher = False


@dataclass(frozen=True)
class Objective:
    """What an engine computes: terms, at a temperature τ of every distribution in them (ranking scores are untempered).

    What no term reads of the teacher is not projected.

    Raises:
        ValueError: two terms of one name.
    """

    terms: tuple[Term, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"two terms have one name ({', '.join(names)}): each is logged under its own.")

    @property
    def active(self) -> tuple[Term, ...]:
        """The terms whose weight is not 0."""
        return tuple(term for term in self.terms if term.weight != 0)

    @property
    def divergence(self) -> Divergence | None:
        """That of the first divergence term, which the statistics hold; a term that is off counts too."""
        dense = [term for term in self.terms if isinstance(term, DivergenceTerm)]
        on = [term for term in dense if term.weight != 0]
        return (on or dense)[0].divergence if dense else None

    @property
    def own_vocabularies(self) -> bool:
        """Whether a divergence reads each model's own ids (`Divergence.own_vocabularies`)."""
        return any(isinstance(term, DivergenceTerm) and term.divergence.own_vocabularies for term in self.active)

    def only(self, name: str) -> Objective:
        """The same with every other term's weight 0."""
        off = tuple(term if term.name == name else dataclasses.replace(term, weight=0.0) for term in self.terms)
        return dataclasses.replace(self, terms=off)

    def without_selections(self) -> Objective:
        """The same on all tokens, where the selections have been applied."""
        return dataclasses.replace(self, terms=tuple(dataclasses.replace(term, selection=None) for term in self.terms))

    def after_cut(self) -> Objective:
        """The same on completions that were cut to what is read: a selection that says by lengths where to cut is applied."""
        cut = lambda term: term.selection is not None and term.selection.prefix_length is not None  # noqa: E731
        left = (dataclasses.replace(term, selection=None) if cut(term) else term for term in self.terms)
        return dataclasses.replace(self, terms=tuple(left))

    def counts(self, lengths: Sequence[int], paired: Sequence[int] | None = None) -> Counts:
        """What the terms are divided by, from the trained tokens of each completion of a step.

        Args:
            lengths: those tokens.
            paired: of them, those at which the teacher was read, for a teacher of another tokenizer: the divisor of terms that
                read it.
        """
        entropy = [term for term in self.active if isinstance(term, EntropyTerm)]
        dense = [term for term in self.active if isinstance(term, DivergenceTerm)]
        of = lambda term: lengths if paired is None or not term.reads_teacher else paired  # noqa: E731
        divisors = {term.name: term.divisor(of(term)) for term in self.active}
        return Counts(
            tokens=sum(lengths),
            selected=divisors[entropy[0].name] if entropy else 0,
            responses=sum(length > 0 for length in lengths),
            direct=divisors[dense[0].name] if dense and (dense[0].selection is not None or paired is not None) else None,
            divisors=divisors,
        )


@dataclass(frozen=True)
class Counts:
    """What the terms are divided by; give the whole optimizer step's (all processes), so that batching is exact.

    Attributes:
        tokens: trained tokens.
        selected: the divisor of an entropy term, the sum over completions of ceil(ρ·L).
        responses: completions with at least one trained token.
        direct: the divisor of a divergence term that selects (`selection.direct_count`); None is `tokens`.
        divisors: of each term by its name, as `Objective.counts` gives them; what is missing here is read from the four
            above, which is all that TSD-KD needs.
    """

    tokens: Number
    selected: Number = 0
    responses: Number = 0
    direct: Number | None = None
    divisors: Mapping[str, Number] = field(default_factory=dict, compare=False)

    def of(self, term: Term) -> Number:
        """A term's divisor.

        Raises:
            ValueError: a term that selects, of whose tokens these counts say nothing.
        """
        if term.name in self.divisors:
            return self.divisors[term.name]
        if term.per_completion:
            return self.responses
        if term.selection is None:
            return self.tokens
        if isinstance(term, EntropyTerm):
            return self.selected
        if not isinstance(term, DivergenceTerm) or self.direct is None:
            raise ValueError(
                f"counts say nothing of the tokens that the {term.name} term selects: pass Counts(tokens, selected, "
                "responses, direct), the last from selection.direct_count over the step's lengths."
            )
        return self.direct

    def to_dict(self) -> dict[str, Number]:
        """Every number that is stated, flat: members by their names, the tokens first, then divisors by `/name`."""
        members = {name: getattr(self, name) for name in ("tokens", "selected", "responses", "direct")}
        stated = {name: value for name, value in members.items() if value is not None}
        return {**stated, **{f"/{name}": value for name, value in self.divisors.items()}}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Number]) -> Counts:
        """Counts from what `to_dict` gave."""
        members = {name: value for name, value in numbers.items() if not name.startswith("/")}
        divisors = {name[1:]: value for name, value in numbers.items() if name.startswith("/")}
        return cls(**members, divisors=divisors)

    @classmethod
    def from_any(cls, counts: Any) -> Counts | None:
        """Counts from `Counts`, (tokens, selected, responses), the same with the direct term's, or None for none."""
        if counts is None or isinstance(counts, Counts):
            return counts
        if isinstance(counts, (tuple, list)) and len(counts) in (3, 4):
            return cls(*counts)
        raise ValueError(f"counts={counts!r}: pass tsdkd.Counts(tokens, selected, responses) or a triple of them.")

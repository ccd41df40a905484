"""What methods share whose teacher may be of another tokenizer."""

from __future__ import annotations

import abc
import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from tsdkd.checks import check_choice, check_share, check_weight
from tsdkd.fused import check_crossing
from tsdkd.methods.base import DivergenceMethod, State, by_share, cross_entropy
from tsdkd.types import Divergence, Objective, RolloutSpec, SampledTerm, Term, TokenBatch, VocabularyMap

ALIGNMENTS = ("text", "position")


@dataclass(frozen=True, kw_only=True)
class CrossTokenizer(DivergenceMethod):
    """A divergence between two vocabularies, beside it a cross-entropy on what was written; of one tokenizer an ordinary one.

    A subclass sets `name`, `paper`, `alignment`, and both forms of its divergence: `divergence_of`, where both models have one
    tokenizer, and `across_of`.

    Attributes:
        distillation_weight: of the divergence.
        cross_entropy_weight: of −log p_S of the completion's tokens; for a data set's completions, not for the student's own.
        lmbda: λ, the probability, drawn for each step, of the student's completions.
        alignment: how the two models' tokens are paired: `"text"` or `"position"`.
    """

    distillation_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    lmbda: float = 1.0
    alignment: str = "text"

    def __post_init__(self) -> None:
        check_share("lmbda", self.lmbda)
        check_weight("distillation_weight", self.distillation_weight)
        check_weight("cross_entropy_weight", self.cross_entropy_weight)
        check_choice("alignment", self.alignment, ALIGNMENTS)
        if not self.distillation_weight and not self.cross_entropy_weight:
            raise ValueError("distillation_weight and cross_entropy_weight are both 0: nothing would be trained.")
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        return by_share(self.lmbda)

    def across(self, vocabularies: VocabularyMap) -> CrossTokenizer:
        made = copy.copy(self)  # with something that is no option
        object.__setattr__(made, "_across", self.across_of(vocabularies))
        check_crossing(made.objective())
        return made

    @abc.abstractmethod
    def across_of(self, vocabularies: VocabularyMap) -> Divergence:
        """The divergence between the two vocabularies."""

    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        ordinary = super().objective(batch, state)
        (term,) = ordinary.terms
        more: dict[str, Any] = {"divergence": vars(self)["_across"]} if "_across" in vars(self) else {}
        terms: list[Term] = [dataclasses.replace(term, weight=float(self.distillation_weight), **more)]
        if self.cross_entropy_weight:
            own = SampledTerm(name="cross_entropy", weight=float(self.cross_entropy_weight), function=cross_entropy)
            terms.append(own)
        return Objective(tuple(terms), ordinary.temperature)

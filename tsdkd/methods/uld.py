"""ULD (Boizard et al. 2024): sorted probabilities, whatever the two tokenizers are."""

from __future__ import annotations

from dataclasses import dataclass

from tsdkd.losses.vocabularies import sorted_distance
from tsdkd.methods.base import State
from tsdkd.methods.crossing import CrossTokenizer
from tsdkd.types import Divergence, VocabularyMap


@dataclass(frozen=True, kw_only=True)
class ULD(CrossTokenizer):
    """Universal logit distillation: the distance of the two models' sorted probabilities.

    loss = λ_ULD · Σ_i |p_S^(i) − p_T^(i)| + cross-entropy, the mean over the tokens that are paired; the first with the first
    (`alignment="position"`) as in the paper, as many as the shorter of the two texts has.

    Attributes:
        distillation_weight: λ_ULD, in the paper beside a `cross_entropy_weight` of 1 on completions that the teacher wrote
            (`lmbda=0`).

    References:
        Boizard et al. 2024; arXiv 2402.12030.
    """

    alignment: str = "position"

    name = "uld"
    title = "ULD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        "id": "2402.12030",
        "citation": (
            "@article{boizard2024towards,\n"
            "    title     = {{Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs}},\n"
            "    author    = {Boizard, Nicolas and El Haddad, Kevin and Hudelot, C{\\'e}line and Colombo, Pierre},\n"
            "    journal   = {arXiv preprint arXiv:2402.12030},\n"
            "    year      = 2024,\n"
            "}"
        ),
    }

    def divergence_of(self, state: State | None = None) -> Divergence:
        return Divergence(sorted_distance, "sorted_distance")

    def across_of(self, vocabularies: VocabularyMap) -> Divergence:
        return Divergence(sorted_distance, "sorted_distance", own_vocabularies=True)

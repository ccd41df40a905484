"""GOLD (Patiño et al. 2025): tokens paired by the text, the generalized JSD on what both vocabularies have."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tsdkd.checks import check_share, check_weight
from tsdkd.losses import resolve_divergence
from tsdkd.losses.vocabularies import matched_divergence
from tsdkd.methods.base import State
from tsdkd.methods.crossing import CrossTokenizer
from tsdkd.types import Divergence, VocabularyMap


@dataclass(frozen=True, kw_only=True)
class GOLD(CrossTokenizer):
    """GKD across tokenizers: where both models begin a token at the same place of the text, their distributions are compared.

    loss = w_m · JSD_β on the tokens that both have + w_u · the sorted distance of the others, the mean over the pairs. With one
    tokenizer it is GKD.

    Attributes:
        beta: β of the generalized JSD: 0 forward KL, 1 reverse KL; 0.5 is TRL's.
        matched_weight, unmatched_weight: w_m and w_u; None: the share of the teacher's tokens that the student has, and the
            rest.

    References:
        Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"; TRL's `experimental.gold`.
    """

    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None

    name = "gold"
    title = "GOLD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Unlocking On-Policy Distillation for Any Model Family",
        "id": "",
        "citation": (
            "@misc{patino2025unlocking,\n"
            "    title     = {{Unlocking On-Policy Distillation for Any Model Family}},\n"
            "    author    = {Pati{\\~n}o, Carlos Miguel and Rasul, Kashif and Gallou{\\'e}dec, Quentin and others},\n"
            "    year      = 2025,\n"
            "    publisher = {Hugging Face},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        check_share("beta", self.beta)
        for name in ("matched_weight", "unmatched_weight"):
            if getattr(self, name) is not None:
                check_weight(name, getattr(self, name))
        if self.matched_weight == self.unmatched_weight == 0:
            raise ValueError("matched_weight and unmatched_weight are both 0: nothing of the teacher would be read.")
        super().__post_init__()

    def divergence_of(self, state: State | None = None) -> Divergence:
        return resolve_divergence("generalized_jsd", beta=self.beta)

    def across_of(self, vocabularies: VocabularyMap) -> Divergence:
        share = vocabularies.share
        function = functools.partial(
            matched_divergence,
            student_ids=vocabularies.student,
            teacher_ids=vocabularies.teacher,
            matched_weight=share if self.matched_weight is None else self.matched_weight,
            unmatched_weight=1.0 - share if self.unmatched_weight is None else self.unmatched_weight,
        )
        return Divergence(function, "matched_divergence", "beta", self.beta, own_vocabularies=True)

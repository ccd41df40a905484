"""GKD (Agarwal et al. 2024): the generalized JSD on the student's own answers, or on the data set's."""

from __future__ import annotations

from dataclasses import dataclass

from tsdkd.checks import check_share
from tsdkd.methods.base import DivergenceMethod
from tsdkd.types import Answers


@dataclass(frozen=True, kw_only=True)
class GKD(DivergenceMethod):
    """On-policy distillation with a divergence of choice.

    loss = JSD_β(p_T ‖ p_S), the mean over tokens; answers by the student with probability λ, else the data set's.

    Attributes:
        beta: β of the divergence: 0 forward KL, 1 reverse KL; 0.9 is what the TSD-KD paper compares with.
        lmbda: λ, the probability, drawn for each step, of the student's answers: 1 on-policy, 0 the data set's.

    References:
        Agarwal et al. 2024, Algorithm 1; arXiv 2306.13649.
    """

    beta: float = 0.9
    lmbda: float = 1.0

    name = "gkd"
    title = "GKD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        "citation": (
            "@inproceedings{agarwal2024policy,\n"
            "    title     = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},\n"
            "    author    = {Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and others},\n"
            "    booktitle = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},\n"
            "    year      = 2024,\n"
            "    note      = {arXiv:2306.13649},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta)
        check_share("lmbda", self.lmbda)

    @property
    def answers(self) -> Answers:
        return Answers(share=self.lmbda, evaluate_on="student" if self.lmbda else "dataset")

    def divergence_of(self) -> tuple[str, float]:
        return "generalized_jsd", self.beta

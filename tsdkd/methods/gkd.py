"""GKD (Agarwal et al. 2024): the generalized JSD on the student's own completions, or on the data set's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tsdkd.checks import check_share
from tsdkd.losses import resolve_divergence
from tsdkd.methods.base import DivergenceMethod, State, by_share
from tsdkd.types import Divergence, RolloutSpec


@dataclass(frozen=True, kw_only=True)
class GKD(DivergenceMethod):
    """On-policy distillation with a divergence of choice.

    loss = JSD_β(p_T ‖ p_S), the mean over tokens; completions by the student with probability λ, else the data set's.

    Attributes:
        divergence: a name in `losses.DIVERGENCES` or a function of the student's and the teacher's logits, `[tokens, vocab]`
            each, to `[tokens]`.
        beta: β of the generalized JSD: 0 forward KL, 1 reverse KL; 0.9 is what the TSD-KD paper compares with.
        lmbda: λ, the probability, drawn for each step, of the student's completions: 1 on-policy, 0 the data set's.

    References:
        Agarwal et al. 2024, Algorithm 1; arXiv 2306.13649.
    """

    divergence: str | Callable = "generalized_jsd"
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
        check_share("beta", self.beta)
        check_share("lmbda", self.lmbda)
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        return by_share(self.lmbda)

    def divergence_of(self, state: State | None = None) -> Divergence:
        return resolve_divergence(self.divergence, beta=self.beta)

"""Supervised KD (Hinton et al. 2015): the forward KL on given completions."""

from __future__ import annotations

from dataclasses import dataclass

from tsdkd.methods.base import DivergenceMethod, State
from tsdkd.types import RolloutSpec


@dataclass(frozen=True, kw_only=True)
class SupervisedKD(DivergenceMethod):
    """Knowledge distillation on the data set's completions, or on those that the teacher writes where there are none.

    loss = KL(p_T ‖ p_S), the mean over tokens.

    References:
        Hinton et al. 2015, arXiv 1503.02531, section 2, without the factor τ².
    """

    name = "supervised_kd"
    title = "Supervised KD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
        "citation": (
            "@article{hinton2015distilling,\n"
            "    title     = {{Distilling the Knowledge in a Neural Network}},\n"
            "    author    = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},\n"
            "    journal   = {arXiv preprint},\n"
            "    year      = 2015,\n"
            "    note      = {arXiv:1503.02531},\n"
            "}"
        ),
    }

    @property
    def rollouts(self) -> RolloutSpec:
        return RolloutSpec(share=0.0, teacher_may_write=True, evaluate_on="dataset")

    def divergence_of(self, state: State | None = None) -> str:
        return "forward_kl"

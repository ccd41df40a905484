"""Speculative KD (Xu et al. 2025): the student's completions, each unlikely token replaced by one of the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tsdkd.checks import check_choice, check_count, check_share
from tsdkd.losses import resolve_divergence
from tsdkd.methods.base import DivergenceMethod, State
from tsdkd.types import Divergence, RolloutSpec

DIVERGENCES = ("forward_kl", "generalized_jsd", "reverse_kl")


@dataclass(frozen=True, kw_only=True)
class SpeculativeKD(DivergenceMethod):
    """Interleaved sampling: a token of the student that is not among the teacher's K best gives way to the teacher's own.

    loss = D(p_T ‖ p_S), the mean over tokens of the interleaved completions. K = vocabulary is on-policy, K = 0 the teacher's
    completions.

    Attributes:
        top_k: K, 25 in the paper.
        divergence: `"generalized_jsd"`, `"forward_kl"`, `"reverse_kl"`, or a function of two logit tensors.
        beta: β of the generalized JSD.

    References:
        Xu et al. 2025, Algorithm 1; arXiv 2410.11325.
    """

    top_k: int = 25
    divergence: str | Callable = "generalized_jsd"
    beta: float = 0.5

    name = "speculative_kd"
    title = "Speculative KD"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
        "id": "2410.11325",
        "citation": (
            "@inproceedings{xu2025speculative,\n"
            "    title     = {{Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved "
            "Sampling}},\n"
            "    author    = {Xu, Wenda and Han, Rujun and Wang, Zifeng and others},\n"
            "    booktitle = {The Thirteenth International Conference on Learning Representations, {ICLR} 2025},\n"
            "    year      = 2025,\n"
            "    note      = {arXiv:2410.11325},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        if isinstance(self.divergence, str):
            check_choice("divergence", self.divergence, DIVERGENCES)
        check_share("beta", self.beta)
        check_count("top_k", self.top_k, smallest=0)
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        return RolloutSpec(writer="speculative", options={"top_k": self.top_k})

    def divergence_of(self, state: State | None = None) -> Divergence:
        return resolve_divergence(self.divergence, beta=self.beta)

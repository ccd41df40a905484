"""AKL (Wu et al. 2024): forward and reverse KL, weighed token by token by where the two models differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsdkd.checks import check_positive, check_share
from tsdkd.losses.divergence import expectation, log_probs
from tsdkd.methods.base import DivergenceMethod, State, by_share
from tsdkd.types import Divergence, RolloutSpec


def adaptive_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, head_mass: float = 0.5) -> torch.Tensor:
    """`g_head / (g_head + g_tail) · KL(p_T ‖ p_S) + g_tail / (g_head + g_tail) · KL(p_S ‖ p_T)`, `[..., vocab]` → `[...]`.

    The head is the shortest run of the teacher's most probable ids (of equal ones the lower first) whose mass reaches
    `head_mass`, the tail the others; g is the sum of |p_T − p_S| over them, without gradient. Both gaps 0: one half each.

    References:
        Wu et al. 2024, section 4; arXiv 2404.02657.
    """
    log_s, log_t = log_probs(student_logits), log_probs(teacher_logits.detach())
    p_s, p_t = log_s.exp(), log_t.exp()
    gaps = (p_t - p_s).detach().abs()
    ranked, order = p_t.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    in_head = before < head_mass  # what stands before a token has not reached the mass
    head = torch.where(in_head, gaps.gather(-1, order), 0.0).sum(-1)
    both = gaps.sum(-1)
    share = torch.where(both > 0, head / both.clamp(min=torch.finfo(both.dtype).tiny), 0.5)
    forward, reverse = expectation(p_t, log_t - log_s), expectation(p_s, log_s - log_t)
    return share * forward + (1.0 - share) * reverse


@dataclass(frozen=True, kw_only=True)
class AKL(DivergenceMethod):
    """Adaptive KL: the forward KL counts for more where the head of the teacher's distribution is missed, the reverse where
    its tail is.

    loss = `adaptive_kl`, the mean over tokens; completions by the student with probability λ, else the data set's.

    Attributes:
        head_mass: μ, the teacher's mass that the head holds, 0.5 in the paper.
        lmbda: λ, drawn for each step; 0, the data set's completions, is the paper's.

    References:
        Wu et al. 2024; arXiv 2404.02657.
    """

    head_mass: float = 0.5
    lmbda: float = 0.0

    name = "akl"
    title = "AKL"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        "id": "2404.02657",
        "citation": (
            "@article{wu2024rethinking,\n"
            "    title     = {{Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models}},\n"
            "    author    = {Wu, Taiqiang and Tao, Chaofan and Wang, Jiahao and others},\n"
            "    journal   = {arXiv preprint arXiv:2404.02657},\n"
            "    year      = 2024,\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        check_share("head_mass", self.head_mass)
        check_positive("head_mass", self.head_mass)
        check_share("lmbda", self.lmbda)
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        return by_share(self.lmbda)

    def divergence_of(self, state: State | None = None) -> Divergence:
        return Divergence(adaptive_kl, "adaptive_kl", "head_mass", self.head_mass)

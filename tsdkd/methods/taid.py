"""TAID (Shing et al. 2025): the target moves from the student to the teacher as the student follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tsdkd.checks import check_share, check_weight
from tsdkd.losses import forward_kl
from tsdkd.methods.base import DivergenceMethod, State, Summary, by_share
from tsdkd.types import Divergence, RolloutSpec


def to_mixture(student_logits: torch.Tensor, teacher_logits: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """`KL(p_t ‖ p_S)`, `p_t = softmax((1 − t) · z_S + t · z_T)` without gradient, `[..., vocab]` → `[...]`, nats."""
    parts = ((1.0 - share, student_logits.detach()), (share, teacher_logits))
    return forward_kl(student_logits, torch.stack([w * z for w, z in parts if w]).sum(0))  # 0 · −∞ is no part of it


class Interpolation(State):
    """t: after step n of N, `min(t_end, max(t_start + (t_end − t_start) n / N, t + α σ(m) (1 − t)))`, where `m ← β m +
    (1 − β) (J' − J) / J'` and J', J are the losses of the last step and of this one; no such move after the first."""

    reads_loss = True

    def __init__(self, method: TAID, max_steps: int | None) -> None:
        self.method, self.max_steps = method, max_steps
        self.share, self.momentum = method.start_share, 0.0
        self.previous: float | None = None

    def after_step(self, summary: Summary) -> None:
        method, loss, adaptive = self.method, summary.terms["direct"], self.share
        if self.previous is not None:
            change = (self.previous - loss) / (self.previous + 1e-15)
            self.momentum = method.momentum * self.momentum + (1.0 - method.momentum) * change
            adaptive += method.step_size * (1.0 - self.share) * (1.0 + math.tanh(self.momentum / 2)) / 2  # a sigmoid
        done = summary.step / self.max_steps if self.max_steps else 0.0
        linear = method.start_share + (method.end_share - method.start_share) * done
        self.share, self.previous = min(method.end_share, max(linear, adaptive)), loss

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("share", "momentum", "previous")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


@dataclass(frozen=True, kw_only=True)
class TAID(DivergenceMethod):
    """Loss = KL(p_t ‖ p_S), p_t between student and teacher, the mean over tokens.

    Attributes:
        start_share, end_share, step_size, momentum: t_start, t_end, α and β of `Interpolation`.
        lmbda: λ, the probability, drawn for each step, of the student's completions; 0, the data set's, is the paper's.

    References: Shing et al. 2025, Algorithm 1; arXiv 2501.16937.
    """

    start_share: float = 0.4
    end_share: float = 1.0
    step_size: float = 5e-4
    momentum: float = 0.99
    lmbda: float = 0.0

    name, title = "taid", "TAID"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        "id": "2501.16937",
        "citation": "@inproceedings{shing2025taid, title = {{TAID}}, author = {Shing, Makoto and others}, year = 2025}",
    }

    def __post_init__(self) -> None:
        for name in ("start_share", "end_share", "momentum", "lmbda"):
            check_share(name, getattr(self, name))
        check_weight("step_size", self.step_size)
        super().__post_init__()

    @property
    def rollouts(self) -> RolloutSpec:
        return by_share(self.lmbda)

    def start(self, max_steps: int | None) -> State:
        return Interpolation(self, max_steps)

    def divergence_of(self, state: State | None = None) -> Divergence:
        share = state.share if isinstance(state, Interpolation) else self.start_share
        return Divergence(to_mixture, "to_mixture", "share", share)

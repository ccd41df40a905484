"""Which reasoning path teaches which student (QR-Distill, 2.4, Eq. 1 to 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tsdkd.checks import check_choice, check_positive

_EDGE = 1e-6  # of a mean gate's distance from 0 and 1, where the entropy's slope would be infinite


@dataclass(frozen=True)
class Routing:
    """Where paths go.

    Attributes:
        alpha: `[paths, students]`, 0 or 1, with the relaxed gates' gradient (straight-through).
        soft: `[paths, students]`, the relaxed gates in (0, 1).
        logits: `[paths, students]`, of being on against off; without noise the gate is on where it is above 0.
    """

    alpha: torch.Tensor
    soft: torch.Tensor
    logits: torch.Tensor


def gumbel_on_off(
    logits: torch.Tensor, temperature: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A two-class Gumbel-Softmax for each entry, straight-through.

    Args:
        logits: `[..., 2]`, of off and on.
        temperature: τ > 0.
        noise: standard Gumbel noise of the logits' shape; None draws none, so the likelier class is taken.

    Returns:
        the gate, 0 or 1, with the relaxed one's gradient, and the relaxed one; each `[...]`.

    References:
        QR-Distill Eq. 2: α ∈ {0, 1}^S, so each student has a choice of its own. One softmax over the students would make their
        sum 1, Eq. 3 the constant 1/S, and Eq. 4 useless.
    """
    check_positive("temperature", temperature)
    soft = ((logits if noise is None else logits + noise) / temperature).softmax(-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach()), soft


class Router(nn.Module):
    """An MLP from a path's encoding to each student's choice.

    Args:
        width: of an encoding.
        students: how many.
        hidden: of the MLP's layer.
    """

    def __init__(self, width: int, students: int, hidden: int = 256) -> None:
        super().__init__()
        self.students = students
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2 * students))

    def forward(self, encodings: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> Routing:
        """The routing of `[paths, width]` encodings; noise is drawn in training mode alone, by `generator`."""
        logits = self.layers(encodings).unflatten(-1, (self.students, 2))
        noise = None
        if self.training:
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float32).clamp(1e-20, 1 - 1e-7)
            noise = -torch.log(-torch.log(uniform)).to(logits)
        alpha, soft = gumbel_on_off(logits, temperature, noise)
        return Routing(alpha, soft, (logits[..., 1] - logits[..., 0]).detach())


def temperature_at(step: int, steps: int, start: float = 1.0, end: float = 0.1, how: str = "exponential") -> float:
    """τ of an optimizer step (from 0) of so many; the paper names no schedule.

    Example:
        >>> [round(temperature_at(step, 3), 3) for step in range(3)], temperature_at(5, 3, how="constant")
        ([1.0, 0.316, 0.1], 1.0)
    """
    check_choice("how", how, ("exponential", "linear", "constant"))
    done = min(1.0, step / max(1, steps - 1))
    if how == "constant":
        return start
    return start * (end / start) ** done if how == "exponential" else start + (end - start) * done


def routing_entropy(alpha: torch.Tensor, questions: Sequence[int], per_student: bool = False) -> torch.Tensor:
    """How balanced the routing is, nats, 0-d; it is maximised.

    Args:
        alpha: `[paths, students]`.
        questions: each path's question.
        per_student: of each student's own mean over a question's paths, averaged; the paper's takes the mean over students too
            (Eq. 3), for which "everything to one of two students" is best.

    Returns:
        Eq. 4, averaged over the questions.

    References:
        QR-Distill Eq. 3 and 4. Eq. 9 adds λ1 times it to a loss while the text maximises it: `qr_objective` subtracts.
    """
    number = {question: row for row, question in enumerate(dict.fromkeys(questions))}
    index = torch.tensor([number[question] for question in questions], device=alpha.device)
    counts = torch.bincount(index, minlength=len(number)).to(alpha)
    sums = alpha.new_zeros(len(number), alpha.shape[1]).index_add(0, index, alpha)
    mean = sums / counts[:, None]
    mean = _EDGE + (1 - 2 * _EDGE) * (mean if per_student else mean.mean(-1, keepdim=True))
    return -(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean()

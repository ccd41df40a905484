"""The whole objective of a batch of paths (QR-Distill, Eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsdkd.checks import check_weight
from tsdkd.pipelines.qr_distill.routing import routing_entropy

ENTROPY_WEIGHT, MUTUAL_WEIGHT = 0.01, 0.1  # λ1 and λ2: the authors' code's; the paper names none


@dataclass(frozen=True)
class Objective:
    """What a batch comes to, each 0-d.

    Attributes:
        loss: Eq. 9, with the entropy subtracted.
        distill: each student's loss on the paths that it was given, `[students]`.
        entropy, mutual: the two others, unweighted.
    """

    loss: torch.Tensor
    distill: torch.Tensor
    entropy: torch.Tensor
    mutual: torch.Tensor


def baseline(losses: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """`[students]`, the mean loss of what each student is given; of all, where that is nothing; without gradient."""
    values, given = losses.detach(), on.sum(0)
    return torch.where(given > 0, (values * on).sum(0) / given.clamp(min=1), values.mean(0))


def mean_of_given(losses: torch.Tensor, alpha: torch.Tensor, given: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`[students]`, the mean loss over the paths that each is given, or its part of some of them; 0 of a student without any.

    Its gradient for a gate is (loss − mean) / given, that of the mean itself: a path that is harder than those that a student
    is given is pushed away, an easier one drawn in. A divisor held fixed would leave loss / given, which is above 0 for every
    path, so that the router would learn to teach nobody.

    Args:
        losses, alpha: `[paths, students]`.
        given: `[students]`, how many paths each is given, in all.
        base: see `baseline`.
    """
    share = (alpha.detach() > 0.5).sum(0) / given.clamp(min=1)
    return (alpha * (losses - base)).sum(0) / given.clamp(min=1) + share * base


def qr_objective(
    losses: torch.Tensor,
    alpha: torch.Tensor,
    questions: Sequence[int],
    mutual: Sequence[torch.Tensor] = (),
    *,
    entropy_weight: float = ENTROPY_WEIGHT,
    mutual_weight: float = MUTUAL_WEIGHT,
    per_student: bool = False,
) -> Objective:
    """Eq. 9 of some paths.

    Args:
        losses: `[paths, students]`, the mean loss of each path's tokens by each student. Where a path is not given to a student
            its value counts nothing, and 0 may stand for one that was not read; the router then learns nothing from it.
        alpha: `[paths, students]`, the gates. Each multiplies its path's loss, which is what gives the router a gradient.
        questions: each path's question.
        mutual: the mutual losses of the paths that several students are given.
        entropy_weight, mutual_weight: λ1 and λ2.
        per_student: see `routing_entropy`.

    Raises:
        ValueError: shapes that differ, or a weight below 0.
    """
    check_weight("entropy_weight", entropy_weight)
    check_weight("mutual_weight", mutual_weight)
    if losses.shape != alpha.shape or losses.shape[0] != len(questions):
        raise ValueError(
            f"losses {tuple(losses.shape)}, gates {tuple(alpha.shape)} and {len(questions)} questions: one row a path, one "
            "column a student."
        )
    on = alpha.detach() > 0.5
    distill = mean_of_given(losses, alpha, on.sum(0), baseline(losses, on))
    entropy = routing_entropy(alpha, questions, per_student)
    together = torch.stack(list(mutual)).mean() if len(mutual) else losses.new_zeros(())
    return Objective(distill.sum() - entropy_weight * entropy + mutual_weight * together, distill, entropy, together)

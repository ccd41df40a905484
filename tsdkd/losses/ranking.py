"""Indirect distillation, Eq. 3-5: the student proposes its best tokens, the teacher only re-ranks them."""

from __future__ import annotations

import torch

from tsdkd.checks import check_candidates
from tsdkd.losses.divergence import full_precision

# Weights of the ranking's stages, by name: from the teacher's logits in its own order.
STAGE_WEIGHTS = ("uniform", "teacher_mass")


def student_candidates(student_logits: torch.Tensor, num_candidates: int = 10) -> torch.Tensor:
    """The ids of the student's highest logits, best first; of equal logits the lower id is the earlier candidate.

    Args:
        student_logits: `[..., vocab]`.
        num_candidates: k, from 2 to vocab.

    Returns:
        `[..., k]`, token ids; a selection, without gradient.

    Raises:
        ValueError: fewer than two candidates or more than the vocabulary holds.

    Example:
        >>> student_candidates(torch.tensor([0.0, 2.0, 1.0, 2.0]), 3).tolist()
        [1, 3, 2]

    References:
        TSD-KD section 3.1.
    """
    check_candidates(num_candidates, student_logits.shape[-1])
    # torch.topk promises no order among ties; a stable sort does.
    return student_logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :num_candidates]


def teacher_order(teacher_scores: torch.Tensor) -> torch.Tensor:
    """The teacher's ranking π of the candidates, its favourite first; equal scores keep the student's order.

    Args:
        teacher_scores: `[..., k]`, the teacher's logits of the candidates, in the student's order.

    Returns:
        `[..., k]`, positions among the candidates; a selection, without gradient.

    Example:
        >>> teacher_order(torch.tensor([0.5, 2.0, 0.5])).tolist()
        [1, 0, 2]
    """
    return teacher_scores.detach().sort(dim=-1, descending=True, stable=True).indices


def teacher_mass(ordered_teacher_scores: torch.Tensor) -> torch.Tensor:
    """How much of the teacher's probability the candidates hold that are not yet placed, stage by stage.

    Formula: `m_i = Σ_{j≥i} q_j`, `q` the softmax of the teacher's untempered logits over the candidates. As stage weights
    of the ranking loss they spare it the order of candidates that the teacher holds impossible; an option of ours.

    Args:
        ordered_teacher_scores: `[..., k]`, the teacher's logits of the candidates in its own order, favourite first.

    Returns:
        `[..., k]`, from 1 downwards, without gradient.

    Example:
        >>> teacher_mass(torch.zeros(4)).tolist()
        [1.0, 0.75, 0.5, 0.25]
    """
    share = full_precision(ordered_teacher_scores.detach()).softmax(-1)
    return share.flip(-1).cumsum(-1).flip(-1)


def plackett_luce_nll(ordered_scores: torch.Tensor, stage_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the log-likelihood that a Plackett-Luce model with these scores ranks its items in the given order.

    Formula: `Σ_i m_i ( log Σ_{j≥i} exp(s_j) − s_i )`; the inner sum runs over the items **not yet placed**. k = 2 is
    Bradley-Terry, `softplus(s_2 − s_1)`.

    Args:
        ordered_scores: `[..., k]`, the student's scores in the teacher's order (favourite first).
        stage_weights: `[..., k]`, m; None is 1 (the paper), `teacher_mass` the option beside it.

    Returns:
        `[...]`, nats: log(k!) for equal scores, near 0 where the student agrees with certainty.

    Example:
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
        >>> round(plackett_luce_nll(scores).item(), 2), round(plackett_luce_nll(scores.flip(0)).item(), 2)
        (1.61, 11.61)

    References:
        TSD-KD Eq. 3-5; Plackett 1975.
    """
    scores = full_precision(ordered_scores)
    k = scores.shape[-1]
    placed = torch.ones(k, k, dtype=torch.bool, device=scores.device).tril(-1)  # row i: the items j < i
    remaining = scores.unsqueeze(-2).expand(*scores.shape, k).masked_fill(placed, float("-inf"))
    nothing = remaining.amax(-1).isneginf()  # only impossible items are left: their order is no choice
    total = remaining.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(-1)
    stages = torch.where(nothing, 0.0, total - scores.masked_fill(nothing, 0.0))
    return (stages if stage_weights is None else stages * stage_weights).sum(-1)


def kendall_tau(teacher_ranks: torch.Tensor) -> torch.Tensor:
    """Kendall's tau between the student's order of the candidates and the teacher's.

    Args:
        teacher_ranks: `[..., k]`, the teacher's order π as `teacher_order` returns it.

    Returns:
        `[...]` in [-1, 1]: 1 where both agree on every pair, -1 where on none.

    Example:
        >>> kendall_tau(torch.tensor([[0, 1, 2], [2, 1, 0]])).tolist()
        [1.0, -1.0]
    """
    k = teacher_ranks.shape[-1]
    later = torch.ones(k, k, dtype=torch.bool, device=teacher_ranks.device).triu(1)
    agree = (teacher_ranks.unsqueeze(-2) > teacher_ranks.unsqueeze(-1)) & later
    return 4.0 * agree.sum((-1, -2)) / max(1, k * (k - 1)) - 1.0

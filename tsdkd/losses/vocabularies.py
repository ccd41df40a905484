"""Distances between next-token distributions over two different vocabularies, per token and unreduced.

The student's logits come first, `[..., V_S]`, then the teacher's, `[..., V_T]`, each whole; both give `[...]`, never negative.
"""

from __future__ import annotations

import torch

from tsdkd.checks import check_share, check_weight
from tsdkd.losses.divergence import _log_mixture, expectation, log_probs


def sorted_distance(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Σ_i |p_S^(i) − p_T^(i)|, where p^(i) is the i-th largest probability, 0 beyond a vocabulary's end; in [0, 2].

    It is the optimal transport between the two distributions where every two different tokens are equally far apart, without
    any knowledge of which tokens they are: a permutation of one model's ids changes nothing.

    Example:
        >>> sorted_distance(torch.tensor([0.0, 9.0]), torch.tensor([9.0, 0.0, -99.0])).item()
        0.0

    References:
        Boizard et al. 2024 (ULD); arXiv 2402.12030.
    """
    ours, theirs = (_sorted(logits, temperature) for logits in (student_logits, teacher_logits.detach()))
    return _padded_distance(ours, theirs)


def _sorted(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return log_probs(logits, temperature).exp().sort(dim=-1, descending=True).values


def _padded_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Σ |a − b| of two rows, the shorter one filled with zeros."""
    both = min(ours.shape[-1], theirs.shape[-1])
    rest = ours[..., both:].sum(-1) + theirs[..., both:].sum(-1)  # none is negative
    return (ours[..., :both] - theirs[..., :both]).abs().sum(-1) + rest


def matched_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_ids: torch.Tensor,
    teacher_ids: torch.Tensor,
    beta: float = 0.5,
    matched_weight: float = 0.5,
    unmatched_weight: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`w_m · JSD_β` over the tokens that both have `+ w_u ·` the sorted distance over the others.

    Probabilities are those of each model's whole vocabulary, so that what stands on shared tokens need not be 1 on either side;
    with `m = β p_T + (1−β) p_S` the first part is `β Σ p_T log(p_T/m) + (1−β) Σ p_S log(p_S/m)` over them, and at β = 0 and 1
    the forward and the reverse KL of measures, `Σ p log(p/q) − Σ p + Σ q`. Where all tokens are shared, the generalized JSD.

    Args:
        student_logits, teacher_logits: `[..., V_S]` and `[..., V_T]`.
        student_ids, teacher_ids: `[M]`, the ids of the same tokens.
        beta: in [0, 1].
        matched_weight, unmatched_weight: w_m, w_u.
        temperature: τ.

    References:
        TRL's GOLD (Patiño et al. 2025), hybrid loss.
    """
    check_share("beta", beta)
    check_weight("matched_weight", matched_weight)
    check_weight("unmatched_weight", unmatched_weight)
    ours, theirs = log_probs(student_logits, temperature), log_probs(teacher_logits.detach(), temperature)
    student_ids, teacher_ids = student_ids.to(ours.device), teacher_ids.to(ours.device)
    value = matched_weight * _of_measures(ours[..., student_ids], theirs[..., teacher_ids], beta)
    lone = [_without(logs, ids) for logs, ids in ((ours, student_ids), (theirs, teacher_ids))]
    if unmatched_weight and any(logs.shape[-1] for logs in lone):
        ordered = [logs.exp().sort(dim=-1, descending=True).values for logs in lone]
        value = value + unmatched_weight * _padded_distance(*ordered)
    return value


def _of_measures(log_s: torch.Tensor, log_t: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized JSD of what two distributions give to the same tokens."""
    s, t = log_s.exp(), log_t.exp()
    if beta in (0.0, 1.0):
        (p, log_p), (q, log_q) = ((t, log_t), (s, log_s)) if beta == 0.0 else ((s, log_s), (t, log_t))
        return expectation(p, log_p - log_q) - p.sum(-1) + q.sum(-1)
    mixture = _log_mixture(log_t, beta, log_s)
    return beta * expectation(t, log_t - mixture) + (1 - beta) * expectation(s, log_s - mixture)


def _without(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The columns that are not among `ids`."""
    kept = torch.ones(logs.shape[-1], dtype=torch.bool, device=logs.device)
    kept[ids] = False
    return logs[..., kept]

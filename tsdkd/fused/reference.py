"""The readable engine: whole logits, `losses/`, `selection.py`, autograd. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.losses import DIVERGENCES, kendall_tau, plackett_luce_nll, student_candidates, teacher_order, token_entropy
from tsdkd.losses.divergence import full_precision
from tsdkd.losses.reduction import divide, response_coefficients, token_coefficients, weighted_sum
from tsdkd.types import Counts, LossTerms, Objective, TokenStatistics, TokenWeights, length_mask


class Layout:
    """Between packed tokens `[tokens]` and padded rows `[responses, longest]`, built from host integers."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.mask = length_mask(lengths, device)
        longest = self.mask.shape[1]
        flat = [row * longest + t for row, length in enumerate(lengths) for t in range(length)]
        self.index = torch.tensor(flat, dtype=torch.long).to(device)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """`[tokens]` → `[responses, longest]`, 0 off the mask; the gradient flows."""
        padded = values.new_zeros(self.mask.numel())
        return padded.index_copy(0, self.index, values).reshape(self.mask.shape)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`[responses, longest]` → `[tokens]`."""
        return values.reshape(-1)[self.index]


def decide(objective: Objective, statistics: TokenStatistics) -> TokenWeights:
    """What the objective's gate and selections say of these tokens."""
    mask = statistics.mask
    none = torch.zeros_like(mask)
    opener = none if objective.opener is None else objective.opener(statistics) & mask
    top = none if objective.top_entropy is None else objective.top_entropy(statistics) & mask
    ones = torch.ones_like(statistics.student_entropy)
    gate = ones if objective.gate is None else objective.gate(statistics).detach()
    return TokenWeights(gate=torch.where(mask, gate, 0.0), opener=opener, top_entropy=top)


def coefficients(
    objective: Objective, weights: TokenWeights, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, what its Plackett-Luce loss, divergence and entropy contribute to the sums of the three terms."""
    dtype = weights.gate.dtype
    direct = token_coefficients(mask, dtype) * weights.gate
    return (
        response_coefficients(weights.opener, dtype),
        direct if objective.direct_weight else torch.zeros_like(direct),
        token_coefficients(weights.top_entropy, dtype),
    )


def local_counts(weights: TokenWeights, mask: torch.Tensor) -> Counts:
    """The counts of these tokens alone, for a caller whose step is this call."""
    return Counts(tokens=mask.sum(), selected=weights.top_entropy.sum(), responses=mask.any(-1).sum())


def metric_sums(
    terms: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    statistics: TokenStatistics,
    weights: TokenWeights,
    candidate_tau: torch.Tensor,
    counts: Counts,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each logged quantity as (sum, count) over these tokens; `counts` are theirs, not the step's."""
    tokens, selected, responses = (torch.as_tensor(c) for c in (counts.tokens, counts.selected, counts.responses))
    indirect, direct, entropy = (term.detach() for term in terms)
    opener = weights.opener.sum()
    assert statistics.teacher_entropy is not None and statistics.top1_agreement is not None
    return {
        "loss/indirect": (indirect, responses),
        "loss/direct": (direct, tokens),
        "loss/entropy": (entropy, selected),
        "student/entropy": (statistics.student_entropy.sum(), tokens),
        "teacher/entropy": (statistics.teacher_entropy.sum(), tokens),
        "gate/mean": (weights.gate.sum(), tokens),
        "opener/tokens": (opener, responses),
        "opener/share": (opener, tokens),
        "entropy_selection/mean": ((statistics.student_entropy * weights.top_entropy).sum(), selected),
        "candidates/tau": (candidate_tau.sum(), opener),
        "candidates/top1_agreement": (statistics.top1_agreement.sum(), tokens),
    }


def assemble(
    objective: Objective,
    per_token: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    statistics: TokenStatistics,
    weights: TokenWeights,
    candidate_tau: torch.Tensor,
    own: Counts,
    divisors: Counts,
) -> LossTerms:
    """The result from per-token values.

    Args:
        per_token: Plackett-Luce loss, divergence and entropy of each token, `[responses, longest]`.
        own: the counts of these tokens, for what is logged.
        divisors: what the terms are divided by.
    """
    nll, distance, token_entropies = per_token
    scales = coefficients(objective, weights, statistics.mask)
    sums = weighted_sum(nll, scales[0]), weighted_sum(distance, scales[1]), weighted_sum(token_entropies, scales[2])
    indirect = divide(sums[0], divisors.responses)
    direct = divide(sums[1], divisors.tokens)
    entropy = divide(sums[2], divisors.selected)
    loss = 0.0 * sums[1]  # keeps a graph where every term is off or nothing is left
    for weight, term in (
        (objective.indirect_weight, indirect),
        (objective.direct_weight, direct),
        (objective.entropy_weight, entropy),
    ):
        if weight != 0:
            loss = loss + weight * term
    return LossTerms(
        loss=loss,
        indirect=indirect,
        direct=direct,
        entropy=entropy,
        statistics=statistics,
        weights=weights,
        ranking_nll=torch.where(weights.opener, nll.detach(), 0.0),
        candidate_tau=candidate_tau,
        sums=metric_sums(sums, statistics, weights, candidate_tau, own),
    )


def evaluate_logits(
    objective: Objective,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    lengths: Sequence[int],
    counts: Counts | None = None,
) -> LossTerms:
    """An objective from packed logits, `[tokens, vocab]` each, already cut to the shared vocabulary."""
    student = full_precision(student_logits)
    teacher = full_precision(teacher_logits.detach()).to(student.dtype)
    layout = Layout(lengths, student.device)
    tau = objective.temperature

    divergence = DIVERGENCES[objective.divergence]
    if objective.divergence in ("forward_kl", "reverse_kl"):
        distance = divergence(student, teacher, temperature=tau)
    else:
        distance = divergence(student, teacher, objective.divergence_parameter, temperature=tau)
    entropy = token_entropy(student, tau)
    favourite = student.argmax(-1, keepdim=True)
    agreement = (teacher.gather(-1, favourite) == teacher.amax(-1, keepdim=True))[:, 0].to(student.dtype)
    statistics = TokenStatistics(
        mask=layout.mask,
        student_entropy=layout.pad(entropy.detach()),
        teacher_entropy=layout.pad(token_entropy(teacher, tau)),
        divergence=layout.pad(distance.detach()),
        top1_agreement=layout.pad(agreement),
    )
    weights = decide(objective, statistics)

    nll = student.new_zeros(student.shape[0])
    candidate_tau = torch.zeros_like(nll)
    if objective.opener is not None:
        rows = layout.pack(weights.opener).nonzero().flatten()
        candidates = student_candidates(student[rows], objective.num_candidates)
        order = teacher_order(teacher[rows].gather(-1, candidates))
        scores = student[rows].gather(-1, candidates.gather(-1, order))
        nll = nll.index_copy(0, rows, plackett_luce_nll(scores))
        candidate_tau[rows] = kendall_tau(order).to(nll.dtype)

    own = local_counts(weights, layout.mask)
    per_token = layout.pad(nll), layout.pad(distance), layout.pad(entropy)
    return assemble(
        objective, per_token, statistics, weights, layout.pad(candidate_tau), own, own if counts is None else counts
    )

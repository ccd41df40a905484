"""The readable engine: whole logits, `losses/`, `selection.py`, autograd. Every other engine is tested against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tsdkd.losses import (
    DIVERGENCES,
    entropy_penalty,
    kendall_tau,
    plackett_luce_nll,
    student_candidates,
    teacher_mass,
    teacher_order,
    token_entropy,
)
from tsdkd.losses.divergence import full_precision, log_probs
from tsdkd.losses.reduction import divide, response_coefficients, token_coefficients, weighted_sum
from tsdkd.selection import counted
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


def needs_of(rule: Callable | None, default: str) -> str:
    """What a rule reads: `"lengths"`, `"token"`, `"student"` or `"both"`; None reads nothing."""
    return "lengths" if rule is None else getattr(rule, "needs", default)


def teacher_scope(objective: Objective) -> str:
    """Where the teacher's distribution is read: on `"all"` tokens, on the direct term's `"selected"`, or on `"none"`."""
    gate, selection = (objective.gate, objective.selection) if objective.direct_weight else (None, None)
    reads_both = (
        needs_of(gate, "token") == "both"
        or needs_of(selection, "both") == "both"
        or needs_of(objective.opener, "both") == "both"
        or needs_of(objective.top_entropy, "both") == "both"
        or (objective.top_entropy is not None and objective.entropy_target == "teacher")
    )
    if reads_both or (objective.direct_weight and selection is None):
        return "all"
    return "selected" if objective.direct_weight else "none"


def select(objective: Objective, statistics: TokenStatistics, readable: torch.Tensor | None) -> torch.Tensor:
    """The direct term's tokens, a bool mask; a selection sees the teacher's statistics only if it needs them.

    Args:
        readable: `TokenBatch.readable`; None is the whole mask.
    """
    readable = statistics.mask if readable is None else readable
    if not objective.direct_weight:
        return torch.zeros_like(statistics.mask)
    if objective.selection is None:
        return readable
    seen = statistics if needs_of(objective.selection, "both") == "both" else statistics.of_student()
    return objective.selection(seen).bool() & readable


def decide(
    objective: Objective, statistics: TokenStatistics, selected: torch.Tensor, readable: torch.Tensor | None
) -> TokenWeights:
    """What the objective's gate and selections say of these tokens; `selected` as `select` gave it."""
    mask = statistics.mask
    none = torch.zeros_like(mask)
    opener = none if objective.opener is None else objective.opener(statistics) & (mask if readable is None else readable)
    top = none if objective.top_entropy is None else objective.top_entropy(statistics) & mask
    gate = torch.ones_like(statistics.student_entropy)
    if objective.gate is not None and objective.direct_weight:
        gate = objective.gate(statistics).detach()
    return TokenWeights(gate=torch.where(selected, gate, 0.0), opener=opener, top_entropy=top, selected=selected)


def coefficients(
    objective: Objective, weights: TokenWeights, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, what its Plackett-Luce loss, divergence and entropy contribute to the sums of the three terms."""
    dtype = weights.gate.dtype
    share = token_coefficients if counted(objective.selection) else response_coefficients
    direct = share(weights.selected, dtype) * weights.gate
    return (
        response_coefficients(weights.opener, dtype),
        direct if objective.direct_weight else torch.zeros_like(direct),
        token_coefficients(weights.top_entropy, dtype),
    )


def local_counts(objective: Objective, weights: TokenWeights, mask: torch.Tensor) -> Counts:
    """The counts of these tokens alone, for a caller whose step is this call."""
    responses = mask.any(-1).sum()
    direct = weights.selected.sum() if counted(objective.selection) else responses
    return Counts(tokens=mask.sum(), selected=weights.top_entropy.sum(), responses=responses, direct=direct)


def metric_sums(
    objective: Objective,
    terms: tuple[torch.Tensor, ...],
    statistics: TokenStatistics,
    weights: TokenWeights,
    candidate_tau: torch.Tensor,
    counts: Counts,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each logged quantity as (sum, count) over these tokens; `counts` are theirs, not the step's."""
    like = statistics.student_entropy
    tokens, selected, responses, divisor = (
        torch.as_tensor(c, device=like.device) for c in (counts.tokens, counts.selected, counts.responses, counts.of_direct)
    )
    indirect, direct, entropy, sampled = (term.detach() for term in terms)
    opener, kept = weights.opener.sum(), weights.selected.sum()
    scored = statistics.mask if statistics.scored is None else statistics.scored
    sums = {"student/entropy": (like.sum(), tokens)}
    if objective.direct_weight:
        sums["loss/direct"] = (direct, divisor)
        sums["gate/mean"] = (weights.gate.sum(), kept)
    if objective.opener is not None:
        sums["loss/indirect"] = (indirect, responses)
        sums["opener/tokens"] = (opener, responses)
        sums["opener/share"] = (opener, tokens)
        sums["candidates/tau"] = (candidate_tau.sum(), opener)
    if objective.top_entropy is not None:
        sums["loss/entropy"] = (entropy, selected)
        sums["entropy_selection/mean"] = ((like * weights.top_entropy).sum(), selected)
    if objective.sampled is not None:
        sums["loss/sampled"] = (sampled, tokens)
    if objective.selection is not None:
        sums["selection/share"] = (kept, tokens)
    if statistics.teacher_entropy is not None and statistics.top1_agreement is not None:
        sums["teacher/entropy"] = (statistics.teacher_entropy.sum(), scored.sum())
        sums["candidates/top1_agreement"] = (statistics.top1_agreement.sum(), scored.sum())
    return sums


def assemble(
    objective: Objective,
    per_token: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    statistics: TokenStatistics,
    weights: TokenWeights,
    candidate_tau: torch.Tensor,
    own: Counts,
    divisors: Counts,
) -> LossTerms:
    """The result from per-token values.

    Args:
        per_token: Plackett-Luce loss, divergence, entropy and sampled-token loss of each token, `[responses, longest]`.
        own: the counts of these tokens, for what is logged.
        divisors: what the terms are divided by.
    """
    nll, distance, token_entropies, sampled_values = per_token
    scales = coefficients(objective, weights, statistics.mask)
    penalties = entropy_penalty(token_entropies, statistics.teacher_entropy, objective.entropy_target)
    sums = (
        weighted_sum(nll, scales[0]),
        weighted_sum(distance, scales[1]),
        weighted_sum(penalties, scales[2]),
        weighted_sum(sampled_values, token_coefficients(statistics.mask, nll.dtype)),
    )
    indirect = divide(sums[0], divisors.responses)
    direct = divide(sums[1], divisors.of_direct)
    entropy = divide(sums[2], divisors.selected)
    sampled = divide(sums[3], divisors.tokens)
    loss = 0.0 * (sums[1] + sums[2])  # keeps a graph where every term is off or nothing is left
    for weight, term in (
        (objective.indirect_weight, indirect),
        (objective.direct_weight, direct),
        (objective.entropy_weight, entropy),
        (objective.sampled_weight, sampled),
    ):
        if weight != 0:
            loss = loss + weight * term
    return LossTerms(
        loss=loss,
        indirect=indirect,
        direct=direct,
        entropy=entropy,
        sampled=sampled,
        statistics=statistics,
        weights=weights,
        ranking_nll=torch.where(weights.opener, nll.detach(), 0.0),
        candidate_tau=candidate_tau,
        sums=metric_sums(objective, sums, statistics, weights, candidate_tau, own),
    )


def evaluate_logits(
    objective: Objective,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    lengths: Sequence[int],
    counts: Counts | None = None,
    *,
    token_ids: torch.Tensor | None = None,
    rows: tuple[int, ...] | None = None,
    readable: torch.Tensor | None = None,
) -> LossTerms:
    """An objective from packed logits, `[tokens, vocab]` each, already cut to the shared vocabulary."""
    student = full_precision(student_logits)
    teacher = None if teacher_logits is None else full_precision(teacher_logits.detach()).to(student.dtype)
    layout = Layout(lengths, student.device)
    tau = objective.temperature
    entropy = token_entropy(student, tau)
    distance = torch.zeros_like(entropy)

    scope = teacher_scope(objective)
    read: dict[str, torch.Tensor] = {}
    if teacher is not None:
        divergence = DIVERGENCES[objective.divergence]
        if objective.divergence in ("forward_kl", "reverse_kl"):
            distance = divergence(student, teacher, temperature=tau)
        else:
            distance = divergence(student, teacher, objective.divergence_parameter, temperature=tau)
        favourite = student.argmax(-1, keepdim=True)
        agreement = (teacher.gather(-1, favourite) == teacher.amax(-1, keepdim=True))[:, 0].to(student.dtype)
        read = {
            "teacher_entropy": layout.pad(token_entropy(teacher, tau)),
            "divergence": layout.pad(distance.detach()),
            "top1_agreement": layout.pad(agreement),
        }
    statistics = TokenStatistics(layout.mask, layout.pad(entropy.detach()), rows=rows, **read)
    selected = select(objective, statistics, readable)
    scored = {"all": layout.mask, "selected": selected, "none": None}[scope]
    statistics = unread(statistics, scored)
    weights = decide(objective, statistics, selected, readable)

    nll = student.new_zeros(student.shape[0])
    candidate_tau = torch.zeros_like(nll)
    if objective.opener is not None and teacher is not None:
        opener_rows = layout.pack(weights.opener).nonzero().flatten()
        candidates = student_candidates(student[opener_rows], objective.num_candidates)
        scores = teacher[opener_rows].gather(-1, candidates)
        order = teacher_order(scores)
        stages = teacher_mass(scores.gather(-1, order)) if objective.ranking_stage_weights == "teacher_mass" else None
        own_scores = student[opener_rows].gather(-1, candidates.gather(-1, order))
        nll = nll.index_copy(0, opener_rows, plackett_luce_nll(own_scores, stages))
        candidate_tau[opener_rows] = kendall_tau(order).to(nll.dtype)

    sampled = torch.zeros_like(nll)
    if objective.sampled is not None:
        assert token_ids is not None, "a term on sampled tokens needs TokenBatch.token_ids"
        log_p = log_probs(student, tau).gather(-1, token_ids.unsqueeze(-1))[:, 0]
        sampled = objective.sampled(log_p, slice(0, len(log_p)))

    own = local_counts(objective, weights, layout.mask)
    per_token = layout.pad(nll), layout.pad(distance), layout.pad(entropy), layout.pad(sampled)
    return assemble(
        objective, per_token, statistics, weights, layout.pad(candidate_tau), own, own if counts is None else counts
    )


def unread(statistics: TokenStatistics, scored: torch.Tensor | None) -> TokenStatistics:
    """The statistics with what belongs to the teacher only where it was `scored`; None of it where that is nowhere."""
    if scored is None:
        return dataclasses.replace(statistics, teacher_entropy=None, divergence=None, top1_agreement=None)
    names = ("teacher_entropy", "divergence", "top1_agreement")
    present = {name: getattr(statistics, name) for name in names}
    kept: dict[str, Any] = {name: torch.where(scored, v, 0.0) for name, v in present.items() if v is not None}
    return dataclasses.replace(statistics, scored=scored, **kept)

"""The readable engine: whole logits, `losses/`, `selection/`, autograd. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.fused.decide import Layout, Taken, assemble, decide, scored_tokens, select, unread
from tsdkd.fused.reads import dense_terms, teacher_scope
from tsdkd.losses import (
    kendall_tau,
    plackett_luce_nll,
    resolve_divergence,
    student_candidates,
    teacher_mass,
    teacher_order,
    token_entropy,
)
from tsdkd.losses.divergence import full_precision, log_probs
from tsdkd.types import (
    Counts,
    DivergenceTerm,
    EntropyTerm,
    LossTerms,
    Objective,
    RankingTerm,
    SampledTerm,
    TokenStatistics,
)

# What the statistics hold where rules read a divergence and no term has one.
MEASURE = resolve_divergence("generalized_jsd", beta=0.9)


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
    paired: Sequence[int] | None = None,
) -> LossTerms:
    """An objective from packed logits, `[tokens, vocab]` each, already cut to the shared vocabulary.

    Args:
        lengths: the trained tokens of each completion.
        counts: what the terms are divided by; None counts these tokens alone.
        token_ids, rows: as in `TokenBatch`.
        readable, paired: `TokenBatch.readable` and `TokenBatch.paired`.
    """
    student = full_precision(student_logits)
    teacher = None if teacher_logits is None else full_precision(teacher_logits.detach()).to(student.dtype)
    layout, tau = Layout(lengths, student.device), objective.temperature
    entropy = token_entropy(student, tau)
    dense, distances = dense_terms(objective), {}

    read: dict[str, torch.Tensor] = {}
    if teacher is not None:
        tempered = (student, teacher) if tau == 1.0 else (student / tau, teacher / tau)
        for one in dense:
            distances[one.name] = one.divergence(*tempered)
        first = distances[dense[0].name] if dense else (objective.divergence or MEASURE)(*tempered)
        read = {"teacher_entropy": layout.pad(token_entropy(teacher, tau)), "divergence": layout.pad(first.detach())}
        if not objective.own_vocabularies:
            favourite = student.argmax(-1, keepdim=True)
            agreement = (teacher.gather(-1, favourite) == teacher.amax(-1, keepdim=True))[:, 0].to(student.dtype)
            read["top1_agreement"] = layout.pad(agreement)
    statistics = TokenStatistics(layout.mask, layout.pad(entropy.detach()), rows=rows, **read)
    chosen = {term.name: select(term, statistics, readable) for term in dense}
    everywhere = layout.mask if readable is None else readable
    statistics = unread(statistics, scored_tokens(teacher_scope(objective), everywhere, chosen, dense))
    taken: dict[str, Taken] = {}
    values: dict[str, torch.Tensor] = {}
    taus: dict[str, torch.Tensor] = {}
    for term in objective.active:
        tokens = chosen[term.name] if term.name in chosen else select(term, statistics, readable)
        taken[term.name] = decide(term, statistics, tokens)
        per_token = torch.zeros_like(entropy)
        if isinstance(term, DivergenceTerm):
            per_token = distances.get(term.name, per_token)
        elif isinstance(term, EntropyTerm):
            per_token = entropy
        elif isinstance(term, RankingTerm):
            candidate_tau = torch.zeros_like(per_token)
            if teacher is not None:
                where = layout.pack(tokens).nonzero().flatten()
                nll, found = _ranking(term, student[where], teacher[where])
                per_token = per_token.index_copy(0, where, nll)
                candidate_tau[where] = found
            taus[term.name] = layout.pad(candidate_tau)
        elif isinstance(term, SampledTerm):
            assert token_ids is not None and term.function is not None, "evaluate() has refused a batch without ids"
            log_p = log_probs(student, tau).gather(-1, token_ids.unsqueeze(-1))[:, 0]
            per_token = term.function(log_p, slice(0, len(log_p)))
        values[term.name] = layout.pad(per_token)
    own = objective.counts(lengths, paired)
    anchor = layout.pad(entropy)
    return assemble(objective, values, taus, statistics, taken, own, own if counts is None else counts, anchor)


def _ranking(term: RankingTerm, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Plackett-Luce loss and Kendall's tau of some tokens."""
    candidates = student_candidates(student, term.num_candidates)
    scores = teacher.gather(-1, candidates)
    order = teacher_order(scores)
    stages = teacher_mass(scores.gather(-1, order)) if term.stage_weights == "teacher_mass" else None
    nll = plackett_luce_nll(student.gather(-1, candidates.gather(-1, order)), stages)
    return nll, kendall_tau(order).to(nll.dtype)

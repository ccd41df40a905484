"""What the rules of the terms decide of these tokens, and from per-token values to the result: shared by every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.fused.chunks import reads_are_free
from tsdkd.losses import entropy_penalty
from tsdkd.losses.reduction import divide, response_coefficients, token_coefficients, weighted_sum
from tsdkd.types import (
    Counts,
    DivergenceTerm,
    EntropyTerm,
    LossTerms,
    Objective,
    RankingTerm,
    Term,
    TermResult,
    TokenStatistics,
    length_mask,
)
from tsdkd.types.rules import name_of


class Layout:
    """Between packed tokens `[tokens]` and padded rows `[completions, longest]`, built from host integers."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.mask = length_mask(lengths, device)
        longest = self.mask.shape[1]
        flat = [row * longest + t for row, length in enumerate(lengths) for t in range(length)]
        self.index = torch.tensor(flat, dtype=torch.long).to(device)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """`[tokens]` → `[completions, longest]`, 0 off the mask; the gradient flows."""
        padded = values.new_zeros(self.mask.numel())
        return padded.index_copy(0, self.index, values).reshape(self.mask.shape)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`[completions, longest]` → `[tokens]`."""
        return values.reshape(-1)[self.index]


@dataclass(frozen=True)
class Taken:
    """What a term's rules decided, `[completions, longest]`: its tokens (bool), and what each weighs, 0 elsewhere."""

    tokens: torch.Tensor
    weights: torch.Tensor

    def coefficients(self, term: Term) -> torch.Tensor:
        """What each token's value contributes to the term's sum."""
        share = response_coefficients if term.per_completion else token_coefficients
        return share(self.tokens, self.weights.dtype) * self.weights


def select(term: Term, statistics: TokenStatistics, readable: torch.Tensor | None) -> torch.Tensor:
    """A term's tokens, a bool mask; `readable` is `TokenBatch.readable`, None for the whole mask."""
    mask = statistics.mask if readable is None or not term.reads_teacher else readable
    if term.selection is None:
        return mask
    chosen = term.selection(statistics).bool() & statistics.mask
    if reads_are_free(mask.device):
        check_count(term, chosen, statistics.mask)
    return chosen & mask


def check_count(term: Term, chosen: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse a selection that keeps other than what its `count` says, which the term is divided by.

    Raises:
        ValueError: the rule, the length, both numbers.
    """
    if term.selection is None or term.selection.count is None:
        return
    for length, kept in zip(mask.sum(-1).tolist(), chosen.sum(-1).tolist(), strict=True):
        if length and term.selection.count(length) != kept:
            raise ValueError(
                f"the selection {name_of(term.selection.function)} of the {term.name} term keeps {kept} tokens of a "
                f"completion of {length}, but its count({length}) is {term.selection.count(length)}, which the term is "
                "divided by. Let them agree, or leave count out."
            )


def decide(term: Term, statistics: TokenStatistics, tokens: torch.Tensor) -> Taken:
    """What a term's gate says of its `tokens`, as `select` gave them."""
    gate = torch.ones_like(statistics.student_entropy) if term.gate is None else term.gate(statistics)
    if term.gate is not None and term.gate.is_own and reads_are_free(tokens.device):
        check_gate(term, gate, tokens)
    return Taken(tokens, torch.where(tokens, gate.to(statistics.student_entropy.dtype), 0.0))


def check_gate(term: Term, gate: torch.Tensor, tokens: torch.Tensor) -> None:
    """Refuse weights below 0; a NaN is the guard's, which knows where it comes from.

    Raises:
        ValueError: the rule, where, what it gave.
    """
    wrong = (tokens & (gate < 0)).nonzero()
    if len(wrong):
        assert term.gate is not None
        row, t = wrong[0].tolist()
        raise ValueError(
            f"the gate {name_of(term.gate.function)} of the {term.name} term gave {gate[row, t].item():g} to token {t} of "
            f"completion {row} ({len(wrong)} of {int(tokens.sum())} tokens): a weight is 0 or more."
        )


def scored_tokens(scope: str, mask: torch.Tensor, taken: Mapping[str, torch.Tensor], dense: Sequence[Term]) -> Any:
    """Where the teacher's distribution was read, by `teacher_scope`; None is nowhere."""
    if scope != "selected":
        return mask if scope == "all" else None
    scored = torch.zeros_like(mask)
    for term in dense:
        scored = scored | taken[term.name]
    return scored


def unread(statistics: TokenStatistics, scored: torch.Tensor | None) -> TokenStatistics:
    """The statistics with what belongs to the teacher only where it was `scored`; None of it where that is nowhere."""
    if scored is None:
        return dataclasses.replace(statistics, teacher_entropy=None, divergence=None, top1_agreement=None)
    names = ("teacher_entropy", "divergence", "top1_agreement")
    present = {name: getattr(statistics, name) for name in names}
    kept: dict[str, Any] = {name: torch.where(scored, v, 0.0) for name, v in present.items() if v is not None}
    return dataclasses.replace(statistics, scored=scored, **kept)


def assemble(
    objective: Objective,
    values: Mapping[str, torch.Tensor],
    taus: Mapping[str, torch.Tensor],
    statistics: TokenStatistics,
    taken: Mapping[str, Taken],
    own: Counts,
    divisors: Counts,
    anchor: torch.Tensor,
) -> LossTerms:
    """The result from per-token values.

    Args:
        values: of each active term by name, `[completions, longest]`: Plackett-Luce loss, divergence, the student's entropy,
            the loss of the sampled token.
        taus: of the ranking terms, Kendall's tau of each token.
        taken: what the terms' rules decided.
        own: the counts of these tokens, for what is logged.
        divisors: what the terms are divided by.
        anchor: a tensor of the student's; its graph is the loss's where every term is off or nothing is left.
    """
    loss = weighted_sum(anchor, torch.zeros_like(anchor))
    results, totals = {}, {}
    for term in objective.active:
        per_token, found = values[term.name], taken[term.name]
        if isinstance(term, EntropyTerm):
            per_token = entropy_penalty(per_token, statistics.teacher_entropy, term.target)
        coefficients, divisor = found.coefficients(term), divisors.of(term)
        total = weighted_sum(per_token, coefficients)
        value = divide(total, divisor)
        loss = loss + term.weight * value
        totals[term.name] = total.detach()
        shown = torch.where(found.tokens, per_token.detach(), 0.0)  # engines compute some on more tokens
        tau = torch.where(found.tokens, taus[term.name], 0.0) if isinstance(term, RankingTerm) else None
        results[term.name] = TermResult(
            value,
            term.weight,
            found.tokens,
            found.weights,
            shown,
            tau,
            type(term),
            coefficients=coefficients.detach(),
            divisor=divisor,
        )
    return LossTerms(loss, statistics, results, _metric_sums(objective, totals, results, statistics, own))


def _metric_sums(
    objective: Objective,
    totals: Mapping[str, torch.Tensor],
    results: Mapping[str, TermResult],
    statistics: TokenStatistics,
    own: Counts,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each logged quantity as (sum, count) over these tokens; `own` are their counts, not the step's."""
    entropy = statistics.student_entropy
    number = lambda count: torch.as_tensor(count, device=entropy.device)  # noqa: E731
    tokens, completions = number(own.tokens), number(own.responses)
    sums = {"student/entropy": (entropy.sum(), tokens)}
    seen: set[type[Term]] = set()
    for term in objective.active:
        found, divisor = results[term.name], number(own.of(term))
        kept = found.tokens.sum()
        more = {f"loss/{term.name}": (totals[term.name], divisor)}
        if isinstance(term, DivergenceTerm):
            more["gate/mean"] = (found.weights.sum(), kept)
            if term.selection is not None:
                more["selection/share"] = (kept, tokens)
        elif isinstance(term, RankingTerm):
            assert found.tau is not None
            more["opener/tokens"] = (kept, completions)
            more["opener/share"] = (kept, tokens)
            more["candidates/tau"] = (found.tau.sum(), kept)
        elif isinstance(term, EntropyTerm):
            more["entropy_selection/mean"] = ((entropy * found.tokens).sum(), kept)
        if type(term) in seen:  # a second term of a kind: its own names beside the first's
            more = {name if name.startswith("loss/") else f"{name}/{term.name}": pair for name, pair in more.items()}
        seen.add(type(term))
        sums.update(more)
    scored = (statistics.mask if statistics.scored is None else statistics.scored).sum()
    read = {"teacher/entropy": statistics.teacher_entropy, "candidates/top1_agreement": statistics.top1_agreement}
    sums.update({name: (values.sum(), scored) for name, values in read.items() if values is not None})
    return sums

"""What an objective reads, and when: where the teacher's distribution, and what ahead of the divergence's own sweep."""

from __future__ import annotations

import logging

from tsdkd.types import DivergenceTerm, EntropyTerm, Objective, RankingTerm, ReadPlan, SampledTerm, Term
from tsdkd.types.rules import Rule, name_of

logger = logging.getLogger(__name__)
_announced: set[tuple] = set()


def dense_terms(objective: Objective) -> list[DivergenceTerm]:
    """The active divergence terms, in order."""
    return [term for term in objective.active if isinstance(term, DivergenceTerm)]


def _reads_both(term: Term) -> bool:
    """Whether a term needs both models' statistics of tokens that it may not take."""
    own_sweep = isinstance(term, DivergenceTerm)  # gives its gate what it reads
    reads = {rule.reads for _, rule in term.rules}
    return (
        "both" in reads or ("token" in reads and not own_sweep) or (isinstance(term, EntropyTerm) and term.target == "teacher")
    )


def teacher_scope(objective: Objective) -> str:
    """Where the teacher's distribution is read: on `"all"` tokens, on those of the divergence (`"selected"`), or `"none"`."""
    dense = dense_terms(objective)
    # The statistics hold the first divergence, which the sweep of a second one does not give.
    if len(dense) > 1 or any(map(_reads_both, objective.active)) or any(term.selection is None for term in dense):
        return "all"
    return "selected" if dense else "none"


def reads_teacher(objective: Objective) -> bool:
    """Whether any term reads the teacher: its distribution, or its scores of candidates."""
    return teacher_scope(objective) != "none" or any(isinstance(term, RankingTerm) for term in objective.active)


def needed_ahead(objective: Objective) -> str:
    """What has to be known of all tokens before a divergence's sweep: `"none"`, the `"student"`'s statistics or `"both"`.

    A divergence's own sweep gives the statistics of the tokens that it takes.
    """
    dense, scope = dense_terms(objective), teacher_scope(objective)
    reads = {rule.reads for term in dense for _, rule in term.rules}
    covered = bool(dense) and dense[0].selection is None
    if "both" in reads or (scope == "all" and not covered):
        return "both"
    others = {rule.reads for term in objective.active for _, rule in term.rules}
    only_sampled = bool(objective.active) and all(isinstance(term, SampledTerm) for term in objective.active)
    alone = scope == "none" and only_sampled and others <= {"lengths"}
    return "student" if "student" in reads or (scope != "all" and not alone) else "none"


def announce_price(objective: Objective) -> None:
    """Say once what a rule costs that reads other tokens."""
    for term in objective.active:
        reading = ("student", "both") if isinstance(term, DivergenceTerm) else ("both",)
        for kind, rule in term.rules:
            announcement = (kind, name_of(rule.function), rule.reads)
            if rule.reads not in reading or announcement in _announced:
                continue
            _announced.add(announcement)
            what = "the student's head" if rule.reads == "student" else "both heads"
            logger.info(
                "the %s %s reads other tokens (needs=%r): every step projects %s ahead of the loss.",
                kind,
                name_of(rule.function),
                rule.reads,
                what,
            )


def read_plan(objective: Objective, lengths: tuple[int, ...]) -> ReadPlan:
    """How much of each completion the models have to read for an objective.

    A selection of first tokens by lengths alone spares both models the rest, where its term is the only one. Openers that
    the student's statistics tell spare the teacher what stands behind the longest of them.
    """
    active = objective.active
    own_token = all(rule.reads == "token" for term in active for kind, rule in term.rules if kind == "gate")
    if len(active) == 1 and own_token and active[0].selection is not None and active[0].selection.prefix_length is not None:
        prefix = tuple(active[0].selection.prefix_length(length) for length in lengths)
        return ReadPlan(tuple(lengths), prefix, prefix)
    if teacher_scope(objective) != "all" and own_token:
        readers = [term for term in active if term.reads_teacher]
        rules = [term.selection for term in readers if term.selection is not None]
        prefixes = [rule for rule in rules if rule.is_prefix and rule.reads == "student"]
        if readers and len(prefixes) == len(readers):
            whole = tuple(lengths)
            return ReadPlan(whole, whole, whole, rule=_longest(prefixes), temperature=objective.temperature)
    return ReadPlan.whole(lengths)


def _longest(prefixes: list[Rule]):
    """Of several prefixes the longest."""

    def rule(statistics):
        kept = prefixes[0](statistics)
        for other in prefixes[1:]:
            kept = kept | other(statistics)
        return kept

    return rule

"""One door to every engine: objectives on hidden states and heads.

`impl` names the engine: `"reference"` materialises the logits and calls `losses/`; `"torch"` projects each head once, chunk by
chunk, in torch; `"triton"` does the chunk's arithmetic in kernels, on a GPU; `"auto"` is `"torch"`, since the kernels have only
been run in Triton's interpreter. The fused engines compute the gradient in the forward
pass: only `.loss` carries one, and it can be backpropagated once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tsdkd.checks import check_candidates, check_choice, check_positive, check_weight
from tsdkd.fused import function, reference, tiles_torch
from tsdkd.fused.decide import Layout, select
from tsdkd.fused.reads import dense_terms, reads_teacher, teacher_scope
from tsdkd.fused.reads import read_plan as read_plan
from tsdkd.losses import ENTROPY_TARGETS, STAGE_WEIGHTS, check_divergence, resolve_divergence
from tsdkd.types import (
    Counts,
    Divergence,
    DivergenceTerm,
    EntropyTerm,
    Head,
    LossTerms,
    Objective,
    RankingTerm,
    SampledTerm,
    TokenBatch,
    TokenStatistics,
)

ENGINES = ("auto", "reference", "torch", "triton")


def shared_heads(student_head: Head, teacher_head: Head | None) -> tuple[Head, Head | None]:
    """Both heads cut to the ids that both have, the first `min(V_S, V_T)`; without a teacher the student's as it is."""
    if teacher_head is None:
        return student_head, None
    size = min(student_head.size, teacher_head.size)
    return student_head.cut(size), teacher_head.cut(size)


def check_batch(batch: TokenBatch, student_head: Head, teacher_head: Head | None) -> None:
    """Refuse hidden states that do not fit their heads."""
    for role, hidden, head in (
        ("student", batch.student_hidden, student_head),
        ("teacher", batch.teacher_hidden, teacher_head),
    ):
        if hidden is None or head is None:
            continue
        if hidden.shape[-1] != head.hidden_size:
            raise ValueError(
                f"{role}_hidden has {hidden.shape[-1]} features but the {role}'s head takes {head.hidden_size}: pass the "
                f"hidden states of the model that the head belongs to."
            )
        if hidden.device != head.weight.device:
            raise ValueError(
                f"{role}_hidden is on {hidden.device} but the {role}'s head is on {head.weight.device}: move one of them."
            )


def _triton_tiles(batch: TokenBatch) -> ModuleType:
    """The Triton kernels; refused where they cannot run."""
    try:
        from tsdkd.fused import tiles_triton
    except ImportError as error:
        raise ValueError(
            f"impl='triton' needs the package triton, which cannot be imported here ({error}); use impl='torch'."
        ) from error
    if batch.student_hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs a GPU but the hidden states are on {batch.student_hidden.device}; use impl='torch' (or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter, slowly)."
        )
    return tiles_triton


def evaluate(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head | None,
    *,
    counts: Counts | None = None,
    impl: str = "auto",
    chunk_tokens: int | str = "auto",
    gradient_filter: float = 0.0,
) -> LossTerms:
    """An objective on packed tokens.

    Args:
        objective: what to compute.
        batch: the trained tokens' hidden states and the completions' lengths.
        student_head, teacher_head: cut to the shared vocabulary here; no teacher (nor hidden states of one) where no term
            reads it.
        counts: what the terms are divided by; None counts this batch alone.
        impl: the engine, one of `ENGINES`.
        chunk_tokens: tokens whose logits stand in memory at a time; `"auto"` chooses from the free memory and logs it.
        gradient_filter: leave out of the two gradient products the blocks of the vocabulary where no token of the chunk
            has a gradient, with respect to its logits and before its weight, of this size; 0 computes all. It reads the
            blocks back from the device, once a chunk; `"reference"` ignores it.

    Returns:
        `LossTerms`, per-token members `[completions, longest]`.

    Raises:
        ValueError: an unknown engine, a chunk below one token, hidden states that do not fit their heads, a divergence of
            your own that two rows show to be none.
    """
    check_choice("impl", impl, ENGINES)
    check_positive("temperature", objective.temperature)
    check_weight("gradient_filter", gradient_filter)
    check_batch(batch, student_head, teacher_head)
    if batch.plan is not None and batch.plan.is_cut:
        objective = objective.after_cut()
    _check_needs(objective, batch, teacher_head, counts)
    if not objective.own_vocabularies:
        student_head, teacher_head = shared_heads(student_head, teacher_head)
    for term in objective.active:
        if isinstance(term, RankingTerm):
            check_candidates(term.num_candidates, student_head.size)
    for term in dense_terms(objective):
        theirs = None if teacher_head is None else teacher_head.size
        check_divergence_once(term.divergence, student_head.size, batch.student_hidden.device, theirs)
    engine: dict[str, Any] = {"impl": impl, "chunk_tokens": chunk_tokens, "gradient_filter": gradient_filter}
    ahead = _selected_ahead(objective, batch)
    if ahead is not None:
        return _on_selected(objective, batch, student_head, teacher_head, counts, ahead, engine)
    if impl != "reference":
        tiles = _triton_tiles(batch) if impl == "triton" else tiles_torch
        return function.evaluate(objective, batch, student_head, teacher_head, counts, tiles, chunk_tokens, gradient_filter)
    teacher_logits = None
    if teacher_head is not None and batch.teacher_hidden is not None:
        teacher_logits = teacher_head.logits(batch.teacher_hidden.detach()).detach()
    return reference.evaluate_logits(
        objective,
        student_head.logits(batch.student_hidden),
        teacher_logits,
        batch.lengths,
        counts,
        token_ids=batch.token_ids,
        rows=batch.rows,
        readable=batch.readable(),
        paired=batch.paired,
    )


def check_divergence_once(
    divergence: Divergence, vocab_size: int, device: torch.device, teacher_size: int | None = None
) -> None:
    """`losses.check_divergence` of one without a tile of its own, once for each function, vocabulary and device; every time
    where it cannot be hashed."""
    if tiles_torch.written_tile(divergence) is not None:
        return
    try:
        key = divergence.function, vocab_size, teacher_size if divergence.own_vocabularies else None, str(device)
        if key not in _checked:
            check_divergence(divergence, vocab_size, device, teacher_size)
            _checked[key] = None
            if len(_checked) > 64:  # functions that are made anew for every call
                _checked.pop(next(iter(_checked)))
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        check_divergence(divergence, vocab_size, device, teacher_size)


_checked: dict[tuple, None] = {}


def check_objective(objective: Objective) -> None:
    """Refuse options of terms that no engine knows.

    Raises:
        ValueError: which, and what there is.
    """
    for term in objective.terms:
        if isinstance(term, RankingTerm):
            check_choice("ranking_stage_weights", term.stage_weights, STAGE_WEIGHTS)
        elif isinstance(term, EntropyTerm):
            check_choice("entropy_target", term.target, ENTROPY_TARGETS)
        elif type(term) not in (DivergenceTerm, SampledTerm):
            raise ValueError(
                f"the term {term.name} is a {type(term).__name__}, which no engine computes: use a DivergenceTerm with a "
                "divergence of your own, a RankingTerm, an EntropyTerm or a SampledTerm."
            )


def _check_needs(objective: Objective, batch: TokenBatch, teacher_head: Head | None, counts: Counts | None) -> None:
    """Refuse a batch or counts that lack what a term reads."""
    check_objective(objective)
    selecting = [term.name for term in dense_terms(objective) if term.selection is not None and not term.per_completion]
    if counts is not None and len(selecting) > 1 and not counts.divisors.keys() >= set(selecting):
        raise ValueError(
            f"counts say one number of the tokens that the terms {', '.join(selecting)} select: pass "
            "Objective.counts(lengths) of the step, or Counts with divisors by name."
        )
    scope = teacher_scope(objective)
    if reads_teacher(objective) and (batch.teacher_hidden is None or teacher_head is None):
        raise ValueError("the objective reads the teacher, but no hidden states or no head of one were given: pass both.")
    partly = batch.plan is not None and batch.plan.teacher != batch.plan.student
    if batch.plan is not None and partly and scope == "all" and batch.plan.pairs is None:
        raise ValueError("the objective reads the teacher on every token, but the plan says that it was not read there.")
    if objective.own_vocabularies or batch.paired is not None:
        check_crossing(objective)
    for term in objective.active:
        if isinstance(term, SampledTerm) and batch.token_ids is None:
            raise ValueError("the objective reads the sampled tokens, but TokenBatch.token_ids is None: pass their ids.")
        if isinstance(term, SampledTerm) and term.function is None:
            raise ValueError(f"the term {term.name} has no function: the batch lacks what it is made of, or it was left out.")


def check_crossing(objective: Objective) -> None:
    """Refuse what a teacher of another tokenizer cannot give.

    Raises:
        ValueError: which term, and why.
    """
    for term in objective.active:
        if isinstance(term, RankingTerm):
            raise ValueError(
                f"the {term.name} term ranks the student's candidates by the teacher's scores, and a teacher of another "
                "tokenizer has no such ids: leave it out, or take a teacher of the student's family."
            )
        if not isinstance(term, DivergenceTerm):
            continue
        if not term.divergence.own_vocabularies:
            raise ValueError(
                f"the {term.name} term compares the two models id by id ({term.divergence.name}), and the teacher is of "
                "another tokenizer: use a method for that (uld, gold)."
            )
        if term.selection is not None or (term.gate is not None and term.gate.reads != "token"):
            raise ValueError(
                f"the {term.name} term has a selection, or a gate that reads other tokens, and a teacher of another tokenizer "
                "is read at some tokens only: leave it out."
            )


def _selected_ahead(objective: Objective, batch: TokenBatch) -> tuple[torch.Tensor, list[int], torch.Tensor] | None:
    """The tokens to keep, their lengths and mask, where a selection reads lengths alone and no other term is on.

    Then no model's head is projected on the others. None in every other case.
    """
    active = objective.active
    if len(active) != 1 or not isinstance(active[0], DivergenceTerm):
        return None
    selection, gate = active[0].selection, active[0].gate
    own_token = gate is None or gate.reads == "token"  # any other sees the whole completion
    if selection is None or selection.count is None or selection.reads != "lengths" or not own_token:
        return None
    lengths = [selection.count(length) for length in batch.lengths]
    mask = batch.mask()
    empty = torch.zeros_like(mask, dtype=torch.float32)
    selected = select(active[0], TokenStatistics(mask, empty, rows=batch.rows), None)
    layout = Layout(batch.lengths, mask.device)
    index = torch.nonzero_static(layout.pack(selected), size=sum(lengths))[:, 0]
    return index, lengths, selected


def _on_selected(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head | None,
    counts: Counts | None,
    ahead: tuple[torch.Tensor, list[int], torch.Tensor],
    engine: dict[str, Any],
) -> LossTerms:
    """The objective on the tokens that `_selected_ahead` found, laid out on all."""
    index, lengths, mask = ahead
    (term,) = objective.active
    divisor = sum(lengths) if counts is None else counts.of(term)
    divisors = Counts(divisor, responses=sum(length > 0 for length in lengths), divisors={term.name: divisor})
    kept = batch.keep(index, lengths)
    terms = evaluate(objective.without_selections(), kept, student_head, teacher_head, counts=divisors, **engine)
    terms.sums["selection/share"] = (mask.sum(), mask.new_tensor(sum(batch.lengths), dtype=torch.long))
    laid = terms.spread(mask)
    return dataclasses.replace(laid, statistics=dataclasses.replace(laid.statistics, mask=batch.mask()))


def divergence_mean(
    divergence: str | Callable,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    **options: Any,
) -> LossTerms:
    """The token mean of a divergence from hidden states and heads.

    Args:
        divergence: a name in `losses.DIVERGENCES`, or a function as `losses.resolve_divergence` takes it.
        temperature: τ, above 0.
        beta, alpha: of the named ones that have it.
        options: as in `evaluate`.

    Raises:
        ValueError: what `evaluate` and `losses.resolve_divergence` refuse.
    """
    given = {name: value for name, value in (("beta", beta), ("alpha", alpha)) if value is not None}
    term = DivergenceTerm(name="direct", divergence=resolve_divergence(divergence, **given))
    return evaluate(Objective((term,), temperature), batch, student_head, teacher_head, **options)


generalized_jsd = functools.partial(divergence_mean, "generalized_jsd")
forward_kl = functools.partial(divergence_mean, "forward_kl")
reverse_kl = functools.partial(divergence_mean, "reverse_kl")
skew_forward_kl = functools.partial(divergence_mean, "skew_forward_kl")
skew_reverse_kl = functools.partial(divergence_mean, "skew_reverse_kl")


@torch.no_grad()
def token_statistics(
    batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, objective: Objective | None = None, **options: Any
) -> TokenStatistics:
    """Entropies, divergence and agreement of every token, `[completions, longest]`, without any gradient's arithmetic.

    `objective` says what is read (`Objective(())`: the student alone, without a teacher); None is a generalized JSD.
    """
    if objective is None:
        objective = Objective((DivergenceTerm(name="direct", divergence=reference.MEASURE),))
    return evaluate(objective, batch, student_head, teacher_head, **options).statistics

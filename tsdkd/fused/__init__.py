"""One door to every engine: objectives on hidden states and heads.

`impl` names the engine: `"reference"` materialises the logits and calls `losses/`; `"torch"` projects each head once, chunk by
chunk, in torch; `"triton"` does the chunk's arithmetic in kernels, on a GPU; `"auto"` is `"torch"`, since the kernels have only
been run in Triton's interpreter. The fused engines compute the gradient in the forward
pass: only `.loss` carries one, and it can be backpropagated once.
"""

from __future__ import annotations

import dataclasses
import os
from types import ModuleType
from typing import Any

import torch

from tsdkd.checks import check_choice, check_positive, check_share, check_weight
from tsdkd.fused import function, reference, tiles_torch
from tsdkd.losses import ENTROPY_TARGETS, STAGE_WEIGHTS
from tsdkd.types import Counts, Head, LossTerms, Objective, TokenBatch, TokenStatistics

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
        batch: the trained tokens' hidden states and the responses' lengths.
        student_head, teacher_head: cut to the shared vocabulary here; no teacher (nor hidden states of one) where no term
            reads it.
        counts: what the terms are divided by; None counts this batch alone.
        impl: the engine, one of `ENGINES`.
        chunk_tokens: tokens whose logits stand in memory at a time; `"auto"` chooses from the free memory and logs it.
        gradient_filter: leave out of the two gradient products the blocks of the vocabulary where no token of the chunk
            has a gradient, with respect to its logits and before its weight, of this size; 0 computes all. It reads the
            blocks back from the device, once a chunk; `"reference"` ignores it.

    Returns:
        `LossTerms`, per-token members `[responses, longest]`.

    Raises:
        ValueError: an unknown engine, a chunk below one token, hidden states that do not fit their heads.
    """
    check_choice("impl", impl, ENGINES)
    check_positive("temperature", objective.temperature)
    check_weight("gradient_filter", gradient_filter)
    check_batch(batch, student_head, teacher_head)
    if batch.cut:
        objective = dataclasses.replace(objective, selection=None)
    _check_needs(objective, batch, teacher_head, counts)
    student_head, teacher_head = shared_heads(student_head, teacher_head)
    ahead = _selected_ahead(objective, batch)
    if ahead is not None:
        index, lengths, mask = ahead
        inner = dataclasses.replace(objective, selection=None)
        own = Counts(len(index), 0, sum(length > 0 for length in lengths))
        divisors = own if counts is None else dataclasses.replace(counts, tokens=counts.of_direct, direct=None)
        engine: dict[str, Any] = {"impl": impl, "chunk_tokens": chunk_tokens, "gradient_filter": gradient_filter}
        terms = evaluate(inner, batch.keep(index, lengths), student_head, teacher_head, counts=divisors, **engine)
        terms.sums["selection/share"] = (mask.sum(), mask.new_tensor(sum(batch.lengths), dtype=torch.long))
        laid = terms.spread(mask)
        return dataclasses.replace(laid, statistics=dataclasses.replace(laid.statistics, mask=batch.mask()))
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
        readable=None if batch.teacher_lengths is None else batch.readable(),
    )


def _check_needs(objective: Objective, batch: TokenBatch, teacher_head: Head | None, counts: Counts | None) -> None:
    """Refuse a batch that lacks what a term reads."""
    check_choice("ranking_stage_weights", objective.ranking_stage_weights, STAGE_WEIGHTS)
    check_choice("entropy_target", objective.entropy_target, ENTROPY_TARGETS)
    reads_teacher = objective.opener is not None or reference.teacher_scope(objective) != "none"
    if reads_teacher and (batch.teacher_hidden is None or teacher_head is None):
        raise ValueError("the objective reads the teacher, but no hidden states or no head of one were given: pass both.")
    if batch.teacher_lengths is not None and reference.teacher_scope(objective) == "all":
        raise ValueError("the objective reads the teacher on every token, but teacher_lengths says that it was not read there.")
    if objective.sampled is not None and batch.token_ids is None:
        raise ValueError("the objective reads the sampled tokens, but TokenBatch.token_ids is None: pass their ids.")
    if counts is not None and counts.direct is None and objective.selection is not None:
        raise ValueError(
            "counts say nothing of the tokens that the direct term selects: pass Counts(tokens, selected, responses, direct), "
            "the last from selection.direct_count over the step's lengths."
        )


def _selected_ahead(objective: Objective, batch: TokenBatch) -> tuple[torch.Tensor, list[int], torch.Tensor] | None:
    """The tokens to keep, their lengths and mask, where a selection reads lengths alone and no other term is on.

    Then no model's head is projected on the others. None in every other case.
    """
    selection = objective.selection
    others = (objective.opener, objective.top_entropy, objective.sampled)
    own_token = reference.needs_of(objective.gate, "token") in ("token", "lengths")
    alone = objective.direct_weight and own_token and not any(other is not None for other in others)
    count = getattr(selection, "count", None)
    if selection is None or count is None or reference.needs_of(selection, "both") != "lengths" or not alone:
        return None
    lengths = [count(length) for length in batch.lengths]
    mask = batch.mask()
    selected = selection(TokenStatistics(mask, torch.zeros_like(mask, dtype=torch.float32), rows=batch.rows)) & mask
    layout = reference.Layout(batch.lengths, mask.device)
    index = torch.nonzero_static(layout.pack(selected), size=sum(lengths))[:, 0]
    return index, lengths, selected


def generalized_jsd(
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, beta: float = 0.9, temperature: float = 1.0, **options: Any
) -> LossTerms:
    """The token mean of `losses.generalized_jsd` from hidden states and heads; `options` as in `evaluate`."""
    check_share("beta", beta)
    objective = Objective("generalized_jsd", beta, temperature=temperature)
    return evaluate(objective, batch, student_head, teacher_head, **options)


def forward_kl(
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, temperature: float = 1.0, **options: Any
) -> LossTerms:
    """The token mean of `losses.forward_kl` from hidden states and heads; `options` as in `evaluate`."""
    objective = Objective("forward_kl", 0.0, temperature=temperature)
    return evaluate(objective, batch, student_head, teacher_head, **options)


def reverse_kl(
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, temperature: float = 1.0, **options: Any
) -> LossTerms:
    """The token mean of `losses.reverse_kl` from hidden states and heads; `options` as in `evaluate`."""
    objective = Objective("reverse_kl", 0.0, temperature=temperature)
    return evaluate(objective, batch, student_head, teacher_head, **options)


def skew_forward_kl(
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, alpha: float = 0.1, temperature: float = 1.0, **options: Any
) -> LossTerms:
    """The token mean of `losses.skew_forward_kl` from hidden states and heads; `options` as in `evaluate`."""
    check_share("alpha", alpha)
    objective = Objective("skew_forward_kl", alpha, temperature=temperature)
    return evaluate(objective, batch, student_head, teacher_head, **options)


def skew_reverse_kl(
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, alpha: float = 0.1, temperature: float = 1.0, **options: Any
) -> LossTerms:
    """The token mean of `losses.skew_reverse_kl` from hidden states and heads; `options` as in `evaluate`."""
    check_share("alpha", alpha)
    objective = Objective("skew_reverse_kl", alpha, temperature=temperature)
    return evaluate(objective, batch, student_head, teacher_head, **options)


@torch.no_grad()
def token_statistics(
    batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, objective: Objective | None = None, **options: Any
) -> TokenStatistics:
    """Entropies, divergence and agreement of every token, `[responses, longest]`, without any gradient's arithmetic.

    `objective` says what is read (`Objective(direct_weight=0.0)`: the student alone, without a teacher).
    """
    return evaluate(objective or Objective(), batch, student_head, teacher_head, **options).statistics

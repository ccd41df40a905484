"""One door to every engine: objectives on hidden states and heads.

`impl` names the engine: `"reference"` materialises the logits and calls `losses/`; `"torch"` projects each head once, chunk by
chunk, in torch; `"triton"` does the chunk's arithmetic in kernels, on a GPU; `"auto"` is `"torch"`, since the kernels have only
been run in Triton's interpreter. The fused engines compute the gradient in the forward
pass: only `.loss` carries one, and it can be backpropagated once.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch

from tsdkd.checks import check_choice, check_positive, check_share, check_weight
from tsdkd.fused import function, reference, tiles_torch
from tsdkd.types import Counts, Head, LossTerms, Objective, TokenBatch, TokenStatistics

ENGINES = ("auto", "reference", "torch", "triton")


def shared_heads(student_head: Head, teacher_head: Head) -> tuple[Head, Head]:
    """Both heads cut to the ids that both have, the first `min(V_S, V_T)`."""
    size = min(student_head.size, teacher_head.size)
    return student_head.cut(size), teacher_head.cut(size)


def check_batch(batch: TokenBatch, student_head: Head, teacher_head: Head) -> None:
    """Refuse hidden states that do not fit their heads."""
    for role, hidden, head in (
        ("student", batch.student_hidden, student_head),
        ("teacher", batch.teacher_hidden, teacher_head),
    ):
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
    teacher_head: Head,
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
        student_head, teacher_head: cut to the shared vocabulary here.
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
    student_head, teacher_head = shared_heads(student_head, teacher_head)
    if impl != "reference":
        tiles = _triton_tiles(batch) if impl == "triton" else tiles_torch
        return function.evaluate(objective, batch, student_head, teacher_head, counts, tiles, chunk_tokens, gradient_filter)
    return reference.evaluate_logits(
        objective,
        student_head.logits(batch.student_hidden),
        teacher_head.logits(batch.teacher_hidden.detach()).detach(),
        batch.lengths,
        counts,
    )


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
    batch: TokenBatch, student_head: Head, teacher_head: Head, *, objective: Objective | None = None, **options: Any
) -> TokenStatistics:
    """Entropies, divergence and agreement of every token, `[responses, longest]`, without any gradient's arithmetic."""
    return evaluate(objective or Objective(), batch, student_head, teacher_head, **options).statistics

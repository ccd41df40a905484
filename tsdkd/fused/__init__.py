"""One door to every engine: objectives on hidden states and heads.

`impl` names the engine: `"reference"` materialises the logits and calls `losses/`; `"auto"` picks the fastest one that
this machine has.
"""

from __future__ import annotations

from tsdkd.checks import check_choice
from tsdkd.fused import reference
from tsdkd.types import Counts, Head, LossTerms, Objective, TokenBatch

ENGINES = ("auto", "reference")


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


def evaluate(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head,
    *,
    counts: Counts | None = None,
    impl: str = "auto",
) -> LossTerms:
    """An objective on packed tokens.

    Args:
        objective: what to compute.
        batch: the trained tokens' hidden states and the responses' lengths.
        student_head, teacher_head: cut to the shared vocabulary here.
        counts: what the terms are divided by; None counts this batch alone.
        impl: the engine, one of `ENGINES`.

    Returns:
        `LossTerms`, per-token members `[responses, longest]`.

    Raises:
        ValueError: an unknown engine, hidden states that do not fit their heads.
    """
    check_choice("impl", impl, ENGINES)
    check_batch(batch, student_head, teacher_head)
    student_head, teacher_head = shared_heads(student_head, teacher_head)
    return reference.evaluate_logits(
        objective,
        student_head.logits(batch.student_hidden),
        teacher_head.logits(batch.teacher_hidden.detach()).detach(),
        batch.lengths,
        counts,
    )

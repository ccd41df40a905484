"""The loss as one autograd node: its gradients are computed in the forward pass, chunk by chunk (`run.py`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tsdkd.fused.gradients import whole
from tsdkd.fused.run import Call, Run
from tsdkd.types import Counts, Head, LossTerms, Objective, SampledTerm, TokenBatch


class FusedObjective(torch.autograd.Function):
    """The loss as one node: its gradients are computed in the forward pass, chunk by chunk, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call) -> torch.Tensor:
        wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        if not call.with_gradient:
            wanted = (False, False, False)
        run = Run(call, hidden, weight, bias, wanted)  # reads what autocast says
        with torch.autocast(hidden.device.type, enabled=False):
            run.read_ahead()
            for dense in run.dense:
                run.divergence_term(dense)
            for term in call.objective.active:
                if isinstance(term, SampledTerm):
                    run.sampled_term(term)
            call.terms = run.finish()
        ctx.gradients = run.gradients if any(wanted) else None
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.spent = False
        return call.terms.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        if ctx.spent:
            raise RuntimeError(
                "the fused loss was backpropagated a second time: its gradients are computed in the forward pass and freed by "
                "the first backward. Call the loss again, or use impl='reference'."
            )
        ctx.spent = True
        gradients, ctx.gradients = ctx.gradients, None
        made = []
        grad_output = grad_output * gradients.unit
        for gradient, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True):
            made.append(None if gradient is None else gradient.mul_(grad_output).to(dtype))
        return (*made, None)


def evaluate(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head | None,
    counts: Counts | None,
    tiles: ModuleType,
    chunk_tokens: int | str,
    gradient_filter: float,
) -> LossTerms:
    """An objective from hidden states and heads that are cut to the shared vocabulary."""
    call = Call(
        objective=objective,
        batch=batch,
        counts=counts,
        student_head=student_head,
        teacher_head=teacher_head,
        chunk_tokens=chunk_tokens,
        gradient_filter=gradient_filter,
        tiles=tiles,
        with_gradient=torch.is_grad_enabled(),
    )
    weight = whole(student_head.weight)
    bias = None if student_head.bias is None else whole(student_head.bias)
    loss = FusedObjective.apply(batch.student_hidden, weight, bias, call)
    assert call.terms is not None
    call.terms.loss = loss
    return call.terms

"""A micro-batch of student and teacher on tensors without memory: what its activations hold, as the architecture runs.

Models of a few layers are run under torch's fake tensors, forward and backward, and what is alive is counted; the layers that
are left out are added by the line through two depths, since all are alike (or alternate: the depths differ by two).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tsdkd.preflight.live import LiveBytes
from tsdkd.teachers.heads import experts_of, last_hidden_state
from tsdkd.trainers.sizes import empty_model

_DEPTHS = (2, 4)


@dataclass(frozen=True)
class Pass:
    """Bytes beside the weights (and gradients that are there already).

    Attributes:
        forward: alive when the forward pass has ended, what the loss leaves for the backward pass with it.
        peak: the most during forward and backward, without what the loss takes for a while.
        gradients: what the backward pass leaves.
    """

    forward: int
    peak: int
    gradients: int = 0


class _Loss(torch.autograd.Function):
    """The fused loss as far as what it leaves goes: the gradients of hidden states and head, in float32 or better."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        work = torch.promote_types(torch.float32, hidden.dtype)
        ctx.hidden = torch.zeros(hidden.shape, dtype=work)
        ctx.weight = torch.zeros(weight.shape, dtype=work) if weight.requires_grad else None
        ctx.dtypes = hidden.dtype, weight.dtype
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, ctx.hidden, ctx.weight = ctx.hidden, ctx.weight, None, None
        ours, theirs = ctx.dtypes
        return hidden.to(ours), None if weight is None else weight.to(theirs)


def _of_depth(config: Any, layers: int) -> Any:
    """The configuration with fewer layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    return small


def _by_depth(config: Any, run: Callable[[Any], Pass]) -> Pass:
    """The pass of the whole model from those of two depths."""
    layers = config.get_text_config().num_hidden_layers
    try:
        if layers <= max(_DEPTHS):
            return run(config)
        few, more = (run(_of_depth(config, depth)) for depth in _DEPTHS)
    except Exception as error:  # whatever an architecture asks that no tensor without memory can answer
        told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"what a {config.model_type} holds while it reads is not known here: it does not run without memory "
            f"({told[:300]}). Try it on the GPU itself (tsdkd train --dry_run step)."
        ) from error

    def whole(name: str) -> int:
        low, high = getattr(few, name), getattr(more, name)
        return int(low + (high - low) * (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))

    return Pass(whole("forward"), whole("peak"), whole("gradients"))


def student_pass(
    config: Any,
    *,
    rows: int,
    length: int,
    completion: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    accumulates: bool = False,
    adapt: Callable[[Any], Any] | None = None,
    attention: str | None = None,
) -> Pass:
    """Forward, loss and backward of a micro-batch of `rows` texts of `length` tokens, `completion` of them trained on.

    Args:
        autocast: the dtype of mixed precision; None is none.
        accumulates: gradients of an earlier micro-batch are there.
        adapt: puts an adapter on a model.
        attention: the implementation.
    """

    dtype, autocast, factor = _of_mixture(config, dtype, autocast)

    def run(small: Any) -> Pass:
        model = _on_meta(small, dtype, attention, adapt).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            _without_memory(model)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                if adapt is not None:
                    model.enable_input_require_grads()
            ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
            where = torch.zeros(rows * completion, dtype=torch.long)
            found: list[Pass] = []
            with LiveBytes(model.parameters()) as live:
                for _ in range(2 if accumulates else 1):
                    before = live.restart()
                    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                        hidden = _states(model, ids, mask).flatten(0, 1)[where]
                        weight = model.get_output_embeddings().weight
                        value = _Loss.apply(hidden, weight)
                    kept = live.now() - before
                    del hidden
                    value.backward()
                    del value
                    left = live.now() - before
                    found.append(Pass(kept, live.peak - before + (factor - 1) * left, factor * left))
            return found[-1]

    return _by_depth(config, run)


def reading_pass(config: Any, *, rows: int, length: int, dtype: torch.dtype, attention: str | None = None) -> Pass:
    """A forward pass without gradient, as the teacher's is."""

    dtype, _, _ = _of_mixture(config, dtype, None)

    def run(small: Any) -> Pass:
        model = _on_meta(small, dtype, attention).eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _without_memory(model)
            ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
            with LiveBytes(model.parameters()) as live:
                before = live.restart()
                states = _states(model, ids, mask)
                kept = live.now() - before
                del states
                return Pass(kept, live.peak - before)

    return _by_depth(config, run)


def _of_mixture(config: Any, dtype: torch.dtype, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype | None, int]:
    """A mixture of experts is run in bfloat16, the dtype of the products over its experts that there are without memory; how
    many times as large its gradients are in its own."""
    if dtype.itemsize < 4 or not experts_of(config.get_text_config()):
        return dtype, autocast, 1
    return torch.bfloat16, None, dtype.itemsize // 2


def _on_meta(config: Any, dtype: torch.dtype, attention: str | None, adapt: Callable[[Any], Any] | None = None) -> Any:
    """A model of this configuration, its adapter on it, on no device."""
    with torch.device("meta"):
        model = empty_model(config, dtype=dtype, **({} if attention is None else {"attn_implementation": attention}))
        return model if adapt is None else adapt(model)


def _without_memory(model: Any) -> None:
    """Fake tensors of a CPU in the place of a model's own, in the fake mode in hand; what is tied stays so."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(fresh, tensor.requires_grad) if is_weight else fresh
                store[name] = made[id(tensor)]


def _states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden state; the mask only where the architecture can be asked without looking at its values."""
    try:
        return last_hidden_state(model, ids, mask)
    except Exception:  # fake tensors have no values: the mask of full rows is none
        return last_hidden_state(model, ids, None)

"""The head of a causal language model, its last hidden state, and the check that together they give its logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsdkd.types import Head

# What families multiply their logits by, and what they divide them by.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_DIVISOR_IS_MULTIPLIER = {"hyperclovax"}


def _whole(*_: torch.Tensor | None) -> AbstractContextManager:
    return nullcontext()


def text_config(model: Any):
    """The configuration of the language model inside `model`."""
    return model.config.get_text_config()


def experts_of(config: Any) -> int | None:
    """How many experts a layer of a mixture has; None of other models."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for name in names if (n := getattr(config, name, None)) is not None), None)


def reads_images(config: Any) -> bool:
    """Whether a model of this configuration reads images."""
    return getattr(config, "vision_config", None) is not None


def head_of(model: Any) -> Head:
    """The model's head with every factor that its family applies to the logits.

    Raises:
        ValueError: the model has no linear head.
    """
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no linear language-model head (get_output_embeddings() gave "
            f"{type(output).__name__}): distillation needs one; pass a causal language model."
        )
    return head_from(output.weight, getattr(output, "bias", None), text_config(model))


def head_from(weight: torch.Tensor, bias: torch.Tensor | None, config: Any) -> Head:
    """A head with every factor that the family of `config` applies to its logits."""
    scale = next((s for name in _MULTIPLIERS if (s := getattr(config, name, None)) is not None), None)
    divisor = getattr(config, _DIVISOR, None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type in _DIVISOR_IS_MULTIPLIER else 1 / divisor
    return Head(weight, bias, 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None))


def vocabulary_size(model: Any) -> int:
    """The rows of the model's head, sharded or whole."""
    weight = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def without_adapter_wrapper(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its adapters stay active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_output(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> Any:
    """What the model gives below its head; the vocabulary is not projected."""
    return without_adapter_wrapper(model).base_model(input_ids=ids, attention_mask=mask, use_cache=False, **more)


def last_hidden_state(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> torch.Tensor:
    """`[rows, longest, hidden]`, what the head reads; `more` is `Rollouts.beside`, or positions of rows one behind the other,
    which have no mask."""
    return backbone_output(model, ids, mask, **more).last_hidden_state


def without_dropout(model: Any) -> None:
    """As `model.eval()`, but for layers in 4 bits, which have no dropout: on some CPUs a pass in `eval` repacks their weights
    for good, and no gradient goes through them then (bitsandbytes 0.50, AVX512-BF16)."""
    for module in model.modules():
        module.training = type(module).__name__ == "Linear4bit"


@torch.no_grad()
def check_head(model: Any, role: str, vocab_size: int, gathered: Callable[..., AbstractContextManager] = _whole) -> None:
    """Refuse a model whose logits are not head(last hidden state), or are not finite, on a short text.

    `gathered(weight, bias)` makes a sharded head whole. This closes the class of silently wrong losses: a scale, cap or bias of
    a family that `head_of` does not know.

    Raises:
        ValueError: naming the role (student or teacher) and the architecture.
    """
    inner = without_adapter_wrapper(model)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    without_dropout(model)
    ids = (torch.arange(8, device=device) * 7 % vocab_size).unsqueeze(0)
    mask = torch.ones_like(ids)
    forward = getattr(inner, "_original_forward", inner)  # without the mixed precision that accelerate puts around it
    own = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
    hidden = last_hidden_state(model, ids, mask)
    output = model.get_output_embeddings()
    with gathered(output.weight, getattr(output, "bias", None)):
        rebuilt = head_of(model).logits(hidden)
    model.train(was_training)
    name = f"{type(inner).__name__} (model_type {text_config(inner).model_type!r})"
    if not bool(torch.isfinite(own).all()):
        raise ValueError(
            f"the {role}, {name}, gives non-finite logits (NaN or Inf) on a short text: its weights are damaged or its dtype "
            f"({own.dtype}) overflows. Check the checkpoint, or load it in bfloat16 or float32."
        )
    error = (own.float() - rebuilt.float()).abs().max().item()
    scale = own.float().abs().max().item()
    # One rounding of the dtype for the projection, one for each factor after it.
    allowed = 8 * torch.finfo(own.dtype).eps * max(scale, 1.0)
    if error > allowed:
        raise ValueError(
            f"the {role}, {name}, does not compute its logits as head(last hidden state): they differ by {error:.3g} (allowed: "
            f"{allowed:.3g}), so its losses would be silently wrong. The architecture is not supported; use another {role}, or "
            f"add its logit factor to tsdkd/teachers/heads.py."
        )

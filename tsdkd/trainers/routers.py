"""The load-balancing loss of a mixture of experts, beside a method's own."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tsdkd.teachers.heads import backbone_output, experts_of, text_config, without_adapter_wrapper
from tsdkd.trainers.host import Host


def has_router_loss(model: Any) -> bool:
    """Whether transformers knows a load-balancing loss of this family."""
    return _function(model) is not None and experts_of(text_config(without_adapter_wrapper(model))) is not None


def _function(model: Any) -> Any:
    return getattr(sys.modules[type(without_adapter_wrapper(model)).__module__], "load_balancing_loss_func", None)


class RouterLoss:
    """The load-balancing loss of a student's routers over the micro-batches of a step, as its family defines it.

    It is a product of means over a micro-batch's tokens, so that the mean over micro-batches is not the step's own.

    Args:
        model: the student.
        weight: of the loss.
        share: of a micro-batch in its step, over all processes.

    Raises:
        ValueError: a family without one.

    References:
        Fedus et al. 2022 (Switch Transformers), equations 4 to 6.
    """

    def __init__(self, model: Any, weight: float, share: float) -> None:
        if not has_router_loss(model):
            raise ValueError(
                f"router_loss_weight={weight} takes a mixture of experts whose load-balancing loss transformers knows; the "
                f"student is a {type(without_adapter_wrapper(model)).__name__}: leave it out."
            )
        self.weight, self.share = weight, share
        config = text_config(without_adapter_wrapper(model))
        self.function, self.experts, self.per_token = _function(model), experts_of(config), config.num_experts_per_tok
        self._value: torch.Tensor | None = None

    def read(self, student: Any, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> torch.Tensor:
        """The last hidden state, `[rows, longest, hidden]`; the routers' loss is kept until it is taken."""
        output = backbone_output(student, ids, mask, output_router_logits=True, **more)
        self._value = self.function(output.router_logits, self.experts, self.per_token, mask)
        return output.last_hidden_state

    def take(self) -> torch.Tensor:
        """The loss of what was read last, 0-d, without its weight."""
        value, self._value = self._value, None
        assert value is not None
        return value


def router_of(host: Host) -> RouterLoss | None:
    """The loss of a run's student, where it has a weight."""
    args = host.args
    if not args.router_loss_weight:
        return None
    share = 1 / (args.gradient_accumulation_steps * host.accelerator.num_processes)
    return RouterLoss(host.model, args.router_loss_weight, share)

"""A step with a NaN or Inf stops before the optimizer sees it: on all processes alike, with one read per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsdkd.types import Rollouts


class NonFiniteError(FloatingPointError):
    """A NaN or Inf in a model's output, in a term of the loss or in the gradient norm; weights are unchanged."""


class Guard:
    """Collects, on the device, what was not finite in the micro-batches of a step.

    Args:
        accelerator: of the run, for the one reduction a step; None where there is no run.
        models: `student` and `teacher` by name, for the message.
    """

    def __init__(self, accelerator: Any, models: Mapping[str, str]) -> None:
        self.accelerator, self.models = accelerator, models
        self._flags: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, list[tuple[torch.Tensor, Rollouts]]] = {}

    def forget(self) -> None:
        """Forget what an interrupted step left."""
        self._flags.clear()
        self._tokens.clear()

    def watch(self, name: str, values: torch.Tensor) -> None:
        """Remember whether `values` hold a NaN or Inf; nothing is read from the device."""
        self._flag(name, ~torch.isfinite(values.detach()).all())

    def watch_tokens(self, name: str, hidden: torch.Tensor, rollouts: Rollouts) -> None:
        """The same for the packed hidden states `[tokens, hidden]` of a micro-batch, and which of its tokens they are."""
        broken = ~torch.isfinite(hidden.detach()).all(-1)
        self._flag(name, broken.any())
        self._tokens.setdefault(name, []).append((broken, rollouts))

    def _flag(self, name: str, flag: torch.Tensor) -> None:
        old = self._flags.get(name)
        self._flags[name] = flag if old is None else old | flag

    def _search(self, name: str) -> str:
        """Where the first such token of this process stands; looked for only once the guard has fired."""
        for broken, rollouts in self._tokens.get(name, []):
            found = broken.nonzero().flatten().tolist()
            if found:
                first = found[0]
                for row, length in enumerate(rollouts.lengths):
                    if first < length:
                        size, end = len(rollouts.prompt_ids[row]), rollouts.prompt_ids[row][-5:]
                        return (
                            f"; first at token {first} of a completion after a prompt of {size} tokens that ends with ids {end}"
                        )
                    first -= length
        return ""

    def check(self, step: int, grad_norm: torch.Tensor | float | None, numbers: Sequence[torch.Tensor] = ()) -> list[float]:
        """Raise on every process if any process saw a NaN or Inf in this optimizer step.

        Args:
            step: the optimizer step about to be made, from 1.
            grad_norm: the step's gradient norm; None where a loss scaler handles infinite ones itself.
            numbers: 0-d tensors that ride on the same reduction.

        Returns:
            the sums of `numbers` over all processes.

        Raises:
            NonFiniteError: naming what was not finite, and where.
        """
        device = self.accelerator.device
        names = list(self._flags)
        flags = [self._flags[name].to(device, torch.float32) for name in names]
        self._flags.clear()
        tokens, self._tokens = self._tokens, {}
        if grad_norm is not None:
            norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=device).detach()
            names.append("the gradient norm")
            flags.append((~torch.isfinite(norm)).float())
        packed = [*flags, *(number.detach().to(device, torch.float32) for number in numbers)]
        if not packed:
            return []
        found = self.accelerator.reduce(torch.stack(packed), reduction="sum").tolist()
        culprits = [name for name, count in zip(names, found, strict=False) if count]
        if culprits:
            self._tokens = tokens
            where = "".join(self._search(name) for name in culprits[:1])
            raise NonFiniteError(
                f"step {step}: NaN or Inf in {', '.join(culprits)}{where} (student: {self.models['student']}, teacher: "
                f"{self.models['teacher']}). The step was not made: the student's weights are those of step {step - 1}, and "
                "nothing was saved. Look at the first name: a model's hidden states point to its checkpoint or dtype (try "
                "bfloat16 or float32 instead of float16), a term to its options, the gradient norm alone to the learning rate "
                "or to mixed precision."
            )
        return found[len(names) :]

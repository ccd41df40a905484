"""A student as its own teacher, reading another prompt: as it was at the start, as it is, or as a moving average.

Self-distillation with privileged context (OPSD, SDFT): the teacher is the student with more to read, so that without another
prompt its loss is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tsdkd.teachers.batches import Batches
from tsdkd.teachers.heads import head_of
from tsdkd.teachers.local import hidden_of
from tsdkd.types import Head, Rollouts

SELF = "self"
SELVES = ("start", "live", "ema")
FILE = "self_teacher.safetensors"


class SelfTeacher:
    """Reads rollouts with the student's own model.

    Of the weights that are trained a second copy is held (none of a `live` teacher), which stands in their place while it
    reads; those of an adapter alone are few, and nothing else of the model is held twice.

    Args:
        model: the student.
        student: the student whole, in evaluation mode and without gradient, for a while.
        how: `start`, `live` or `ema`.
        decay: of `ema`: average ← decay · average + (1 − decay) · weights, once an optimizer step.
        step: the optimizer steps made.
        batch_size: rows of a forward pass, or `Batches`.
        device: where the loss is computed.
        autocast: the mixed-precision context of a forward pass.
    """

    writes = "not"
    is_remote = False

    def __init__(
        self,
        model: Any,
        student: Callable[[], AbstractContextManager[Any]],
        *,
        how: str,
        decay: float,
        step: Callable[[], int],
        batch_size: int | Batches,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model, self.student, self.how, self.decay, self.step = model, student, how, decay, step
        self.batch_size, self.device, self.autocast = batch_size, device, autocast
        self._trained = {} if how == "live" else {name: p for name, p in model.named_parameters() if p.requires_grad}
        # An average in half precision would not move: what a step adds is less than half a unit of its weights.
        wide = lambda p: torch.float32 if how == "ema" and p.dtype.itemsize < 4 else p.dtype  # noqa: E731
        self._kept = {name: p.detach().to(wide(p), copy=True) for name, p in self._trained.items()}
        self._seen = 0  # the optimizer step that the average has last taken in

    @property
    def head(self) -> Head:
        """The head as the teacher reads with it, without gradient."""
        head = head_of(self.model)
        kept = {id(p): self._kept[name] for name, p in self._trained.items()}
        weight, bias = (None if p is None else kept.get(id(p), p.detach()).to(p.dtype) for p in (head.weight, head.bias))
        assert weight is not None
        return dataclasses.replace(head, weight=weight, bias=bias)

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        self._take_in()
        with self.student() as model, self._in_place():
            return hidden_of(model, rollouts.first(lengths), 0, self.batch_size, self.device, self.autocast)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The kept weights in the student's place."""
        own = {name: p.data for name, p in self._trained.items()}
        for name, p in self._trained.items():
            p.data = self._kept[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in self._trained.items():
                p.data = own[name]

    @torch.no_grad()
    def _take_in(self) -> None:
        """Let the average follow the weights, once an optimizer step."""
        if self.how != "ema" or self.step() == self._seen:
            return
        self._seen = self.step()
        for name, p in self._trained.items():
            self._kept[name].lerp_(p.detach().to(self._kept[name].dtype), 1 - self.decay)

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """What a run that goes on cannot make again: the average, or the start of weights that a checkpoint replaces."""
        if self._kept:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self._kept.items()}
            save_file(tensors, folder / FILE, {"step": str(self._seen)})

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it has no such file, or one of another model.
        """
        if not self._kept:
            return
        file = folder / FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {FILE}, which the teacher {SELF} ({self.how}) goes on from: it is of another run."
            )
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            seen = int(opened.metadata()["step"])
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in self._kept.items()}:
            raise ValueError(f"{file} is of another student: its weights differ in name or shape.")
        for name, tensor in tensors.items():
            self._kept[name].copy_(tensor)
        self._seen = seen

    def close(self) -> None:
        """Nothing is held beyond the model itself."""

"""Room for a teacher: the student, and by option its optimizer, leave the device while another model reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tsdkd.teachers.swap import Parked


class Room:
    """A context in which the student's weights are not on the device; entered within itself it does nothing more.

    Args:
        trainer: whose student it is.
        with_optimizer: its optimizer's state leaves, too.
    """

    def __init__(self, trainer: Any, with_optimizer: bool) -> None:
        self.trainer, self.with_optimizer = trainer, with_optimizer
        self._weights, self._states = Parked(), Parked()
        self._inside = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside = True
        self._weights = _parked(self._weights, list(self.trainer.accelerator.unwrap_model(self.trainer.model).parameters()))
        self._states = _parked(self._states, self._of_optimizer())
        leaving = self._weights, self._states
        with self._timed():
            for parked in leaving:
                parked.down()
        try:
            yield
        finally:
            with self._timed():
                for parked in leaving:
                    parked.up()
            self._inside = False

    def _of_optimizer(self) -> list[torch.Tensor]:
        if not self.with_optimizer or self.trainer.optimizer is None:
            return []
        devices = {parameter.device for parameter in self.trainer.model.parameters()}  # accelerate's own has no number
        values = (value for state in self.trainer.optimizer.state.values() for value in state.values())
        return [v for v in values if isinstance(v, torch.Tensor) and v.device in devices and v.ndim]

    def _timed(self) -> AbstractContextManager:
        loop = getattr(self.trainer, "loop", None)  # not there yet while a teacher is checked
        return nullcontext() if loop is None else loop.metrics.time(self.trainer.mode, "swap")


def _parked(before: Parked, tensors: list[torch.Tensor]) -> Parked:
    """What parks these tensors; the one from before, and its CPU memory, where they are the same."""
    return before if before.holds(tensors) else Parked(tensors)

"""What a run has taken until now, over all processes: tokens trained on, FLOPs by part, seconds. A checkpoint and a saved
student say it (`spent.json`), so that scores can be held against it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tsdkd.costs import PARTS
from tsdkd.data.spent import SPENT, read_spent
from tsdkd.trainers.metrics import Metrics


class Spent(TrainerCallback):
    """Counts the steps that are made; a run that goes on counts from its checkpoint.

    Args:
        metrics: which counts the tokens.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.flops = dict.fromkeys(PARTS, 0.0)
        self.seconds = 0.0
        self._pending: Mapping[str, float] | None = None  # of the step in hand, on this process
        self._began: float | None = None

    def prepared(self, flops: Mapping[str, float] | None) -> None:
        """A step is about to be made, for so many FLOPs of this process; None where they are not known."""
        self._pending = flops

    @property
    def numbers(self) -> list[torch.Tensor]:
        """TFLOPs of the step in hand by part, to be summed over all processes."""
        step = self._pending or {}
        return [torch.tensor(step.get(part, 0.0) / 1e12) for part in PARTS]

    def step_made(self, tflops: Sequence[float]) -> None:
        """Count a step: the sums of `numbers`."""
        for part, count in zip(PARTS, tflops, strict=True):
            self.flops[part] += count * 1e12
        self._pending = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
        self._began = None

    def figures(self) -> dict[str, Any]:
        """`trained_tokens`, `flops` by part (empty where none were counted) and `seconds` of steps."""
        flops = {part: count for part, count in self.flops.items() if count}
        return {"trained_tokens": self.metrics.trained_tokens, "flops": flops, "seconds": round(self.seconds, 3)}

    def logged(self) -> dict[str, float]:
        """The same for a log: `spent/…`, FLOPs in units of 10¹²."""
        made = {"spent/trained_tokens": float(self.metrics.trained_tokens), "spent/seconds": self.seconds}
        return made | {f"spent/tflop/{part}": count / 1e12 for part, count in self.flops.items() if count}

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint or beside a student."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPENT).write_text(json.dumps(self.figures()) + "\n")

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; one without the file, of an earlier version, changes nothing."""
        found = read_spent(folder)
        if found is not None:
            self.flops = {part: float(found["flops"].get(part, 0.0)) for part in PARTS}
            self.seconds = float(found["seconds"])
            self.metrics.load_state_dict(int(found["trained_tokens"]))

"""What is logged: sums and counts kept on the device and averaged exactly over a window, times, and tokens trained."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

logger = logging.getLogger(__name__)


class Sums:
    """Adds up (sum, count) pairs; a window's value is the sum of sums over the sum of counts, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add detached 0-d tensors; nothing is read from the device."""
        for name, (total, count) in sums.items():
            pair = (total.detach().double(), count.detach().double())
            old = self._sums.get(name)
            self._sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def add_host(self, name: str, total: float, count: float = 1.0) -> None:
        """Add a number of this process."""
        self.add({name: (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))})

    def flush(self, accelerator: Any) -> dict[str, float]:
        """The window's values, and forget it. Every process must call this; one reduction and one read in all.

        Processes may have seen different things (the rows of one of several teachers): what one lacks adds nothing.
        """
        names = sorted(self._sums)
        if accelerator.num_processes > 1:
            names = sorted(set().union(*gather_object([names])))
        if not names:
            return {}
        none = (torch.zeros((), dtype=torch.float64),) * 2
        pairs = [self._sums.get(name, none) for name in names]
        packed = torch.stack([torch.stack([part.to(accelerator.device) for part in pair]) for pair in pairs])
        self._sums.clear()
        totals = accelerator.reduce(packed, reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count > 0}


class Stopwatch:
    """Seconds spent in named sections; on CUDA by events, so that nothing waits for the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        begin = self._mark()
        try:
            yield
        finally:
            self._spans.setdefault(name, []).append((begin, self._mark()))

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading."""
        if self._cuda and self._spans:
            torch.cuda.synchronize()
        seconds = {
            name: sum(b.elapsed_time(e) / 1000 if self._cuda else e - b for b, e in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, GiB: of the device where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


class Metrics:
    """The logging windows of training and evaluation, the time spent, and the tokens trained on.

    Args:
        accelerator: of the run.
        weights: gives each term's weight in the loss of now, by name.
    """

    def __init__(self, accelerator: Any, weights: Callable[[], Mapping[str, float]]) -> None:
        self.accelerator, self.weights = accelerator, weights
        self.sums = {mode: Sums() for mode in ("train", "eval")}
        self.watches = {mode: Stopwatch(accelerator.device) for mode in self.sums}
        self.constants: dict[str, Callable[[], float]] = {}  # read in every window
        self._tokens_of_window = 0
        self._steps_of_window = 0
        self._flops_of_window = 0.0
        self._peak: float | None = None
        self._spent: torch.Tensor | None = None
        self.spent: Callable[[], Mapping[str, float]] = dict  # all steps until now, in every window
        self._left_out: set[str] = set()

    def add(self, mode: str, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add (sum, count) pairs."""
        self.sums[mode].add(sums)

    def add_host(self, mode: str, name: str, total: float, count: float = 1.0) -> None:
        """Add a number of this process."""
        self.sums[mode].add_host(name, total, count)

    def time(self, mode: str, section: str):
        """A context whose seconds are counted."""
        return self.watches[mode].section(section)

    def step_prepared(self, own_tokens: int, all_tokens: torch.Tensor) -> None:
        """Count a training step's tokens, this process's and all processes'."""
        self._tokens_of_window += own_tokens
        spent = all_tokens.double()  # float32 stops counting by ones at 16.7 million
        self._spent = spent if self._spent is None else self._spent + spent

    def computed(self, flops: Mapping[str, float], peak: float | None, elsewhere: Collection[str] = ()) -> None:
        """A training step's FLOPs for this process by part, which of them are made elsewhere, and what its GPU could make a
        second, where that is known."""
        for part, count in flops.items():
            self.add_host("train", f"tflop/{part}", count / 1e12, 1 / self.accelerator.num_processes)
        self._flops_of_window += sum(count for part, count in flops.items() if part not in elsewhere)
        self._peak = peak

    def step_made(self) -> None:
        """Count an optimizer step."""
        self._steps_of_window += 1

    @property
    def trained_tokens(self) -> int:
        """Tokens of completions trained on so far, over all processes."""
        return 0 if self._spent is None else int(self._spent.item())

    def state_dict(self) -> int:
        """What a checkpoint keeps: the tokens trained on."""
        return self.trained_tokens

    def load_state_dict(self, state: int) -> None:
        """Continue from a checkpoint."""
        self._spent = torch.tensor(float(state), dtype=torch.float64, device=self.accelerator.device)

    def window(self, mode: str) -> dict[str, float]:
        """The window's metrics, and forget it. Every process must call this."""
        sums, seconds = self.sums[mode], self.watches[mode].read()
        if mode == "train" and self._steps_of_window:
            steps, whole = self._steps_of_window, seconds.get("step", 0.0)
            parts = {name: seconds.get(name, 0.0) for name in ("rollout", "teacher", "loss")}
            parts["student"] = whole - sum(parts.values())  # forward, backward and the gradients' exchange
            within = ("teacher/", "swap")  # of several teachers each; what they and the student are moved in
            parts |= {name: value for name, value in seconds.items() if name.startswith(within)}
            for name, value in parts.items():
                sums.add_host(f"time/{name}", value, steps)
            sums.add_host("tokens_per_second", self._tokens_of_window, whole / self.accelerator.num_processes)
            for name, value in [*((name, read()) for name, read in self.constants.items()), *self.spent().items()]:
                sums.add_host(name, value)
            if self._peak and whole:
                sums.add_host("mfu", self._flops_of_window, whole * self._peak)
            self._steps_of_window = self._tokens_of_window = 0
            self._flops_of_window = 0.0
        metrics = sums.flush(self.accelerator)
        if not metrics:
            return {}
        if mode == "eval":
            metrics["loss"] = self._loss_of(metrics)
        else:
            peak = torch.tensor(peak_memory_gib(self.accelerator.device), device=self.accelerator.device)
            metrics["memory/peak_gib"] = self.accelerator.gather(peak).max().item()
        return metrics

    def _loss_of(self, metrics: Mapping[str, float]) -> float:
        """The weighted sum of the terms; one that an evaluation cannot compute is left out, and named once."""
        weighted = {name: weight for name, weight in self.weights().items() if weight}
        missing = sorted(name for name in weighted if f"loss/{name}" not in metrics)
        if set(missing) - self._left_out:
            self._left_out.update(missing)
            logger.warning(
                "eval_loss leaves out %s: an evaluation's completions do not bring what the term reads. It is the weighted "
                "sum of the others.",
                ", ".join(missing),
            )
        return sum(weight * metrics[f"loss/{name}"] for name, weight in weighted.items() if name not in missing)

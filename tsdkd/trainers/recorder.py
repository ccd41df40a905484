"""Sums and counts of what is logged, kept on the device and averaged exactly over a window, and a stopwatch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Recorder:
    """Adds up (sum, count) pairs; a window's value is the sum of sums over the sum of counts, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add detached 0-d tensors; nothing is read from the device."""
        for name, (total, count) in sums.items():
            pair = (total.detach().double(), count.detach().double())
            old = self._sums.get(name)
            self._sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def add_host(self, name: str, total: float, count: float = 1.0) -> None:
        """Add a number of this process."""
        self.add({name: (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))})

    def flush(self, accelerator) -> dict[str, float]:
        """The window's values, and forget it. Every process must call this; one reduction and one read in all."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        packed = torch.stack([torch.stack([part.to(accelerator.device) for part in self._sums[name]]) for name in names])
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

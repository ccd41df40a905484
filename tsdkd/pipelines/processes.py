"""The processes of a run, and what they add up: one alone adds nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def is_one_of_several() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Processes:
    """Those that `accelerate launch` started, or one."""

    def __init__(self) -> None:
        self.rank, self.count, self.is_first = 0, 1, True
        if is_one_of_several():
            from accelerate import PartialState

            # Where there is no GPU accelerate takes a launched process for one alone, unless it is told of the CPU.
            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count = self._state.process_index, self._state.num_processes
            self.is_first = self._state.is_main_process

    def devices(self, students: int) -> list[torch.device]:
        """Of each student: a process's own where there are several, else the GPUs in turn."""
        if self.count > 1:
            return [self._state.device] * students
        gpus = torch.cuda.device_count()
        return [torch.device(f"cuda:{number % gpus}" if gpus else "cpu") for number in range(students)]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of every process's values, on the CPU."""
        if self.count == 1:
            return values
        total = values.to(self._state.device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients; none where no process has one, as in one process."""
        if self.count == 1:
            return
        has = self.sum(torch.tensor([float(p.grad is not None) for p in parameters]))
        for p, some in zip(parameters, has.tolist(), strict=True):
            if some:
                gradient = (torch.zeros_like(p) if p.grad is None else p.grad).to(self._state.device)
                torch.distributed.all_reduce(gradient)
                p.grad = gradient.to(p.device)

    def union(self, values: set[int]) -> set[int]:
        """Of every process's set."""
        if self.count == 1:
            return values
        found: list[set[int]] = [set()] * self.count
        torch.distributed.all_gather_object(found, values)
        return set().union(*found)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

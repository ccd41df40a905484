"""What a run's steps compute, counted from the lengths of their texts: `tflop/<part>`, and `mfu`, their share of a peak."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.costs import ModelSize, backward_factor, gpu_named, head_products
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.sizes import size_of
from tsdkd.types import ReadPlan, Rollouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spending:
    """The FLOPs of steps, as `tsdkd.costs` counts them.

    Args:
        student: its sizes.
        teachers: those of the teachers by name; one alone has the name None.
        trained: share of the student's parameters that have a gradient.
        checkpointing: its layers are computed again in the backward pass.
        peak: FLOPs a second of this process's GPU; None of one that is not known, and of a CPU.
        elsewhere: parts that a server makes, which are no share of that.
    """

    student: ModelSize
    teachers: Mapping[str | None, ModelSize]
    trained: float
    checkpointing: bool
    peak: float | None = None
    elsewhere: frozenset[str] = frozenset()

    def of(
        self,
        rollouts: Rollouts,
        read: Rollouts,
        plan: ReadPlan,
        written: Sequence[str] = ("student",),
        *,
        texts: Sequence[int] = (),
        read_first: bool = False,
    ) -> dict[str, float]:
        """The FLOPs of a step's rollouts on this process, by part.

        Args:
            read: what the teacher reads.
            plan: how far each is read.
            written: whose forward passes wrote the completions: `student`, `teacher`.
            texts: tokens of each text of a corpus that is trained on beside them.
            read_first: the student read all, and its head, before the teacher was asked (a rule of what it reads).
        """
        ours, factor = self.student, backward_factor(self.trained, self.checkpointing)
        made = {
            "student": factor * sum(ours.forward_flops(length, 1) for length in _lengths(rollouts.first(plan.student))),
            "loss": 2.0 * head_products(self.trained) * ours.head * sum(plan.student),
        }
        made["student"] += factor * sum(ours.forward_flops(length, 1) for length in texts)
        made["loss"] += 2.0 * head_products(self.trained) * ours.head * sum(length - 1 for length in texts)
        if read_first:
            made["student"] += sum(ours.forward_flops(length, 1) for length in _lengths(rollouts))
            made["loss"] += 2.0 * ours.head * sum(rollouts.lengths)
        writing = [ours] if "student" in written else []
        writing += list(self.teachers.values()) if "teacher" in written else []
        if writing:
            pairs = list(zip(_lengths(rollouts), map(len, rollouts.completion_ids), strict=True))
            made["rollout"] = sum(size.writing_flops(length, 1, drawn) for size in writing for length, drawn in pairs)
        if self.teachers:
            made["teacher"] = 0.0
            for row, length in enumerate(_lengths(read.first(plan.teacher))):
                named = None if rollouts.teachers is None else rollouts.teachers[row]
                own = [self.teachers[named]] if named in self.teachers else list(self.teachers.values())  # averaged: all
                for size in own:
                    made["teacher"] += size.forward_flops(length, 1)
                    made["loss"] += 2.0 * size.head * plan.teacher[row]
        return made


def _lengths(rollouts: Rollouts) -> list[int]:
    """Tokens of each row, its prompt's with them."""
    return [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]


def spending_of(host: Any, setup: Setup) -> Spending | None:
    """A run's; None where a model's sizes cannot be told."""
    try:
        student = size_of(setup.student_config)
        reads = setup.recording is None and setup.method.reads_teacher
        teachers = {
            name: size_of(part.teacher_config) for name, part in setup.apart.items() if reads and part.teacher is not None
        }
    except Exception as error:  # an architecture that builds on no device: it is a number for the log, and no more
        logger.info("the FLOPs of a step are not counted: %s", str(error).splitlines()[0])
        return None
    model = host.accelerator.unwrap_model(host.model)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, has_gradient in sizes if has_gradient) / max(1, sum(size for size, _ in sizes))
    gpu = gpu_named(torch.cuda.get_device_name(host.accelerator.device)) if host.accelerator.device.type == "cuda" else None
    peak = None if gpu is None else gpu.tflops * 1e12
    args = host.args
    served = {"rollout"} if args.use_vllm and args.vllm_mode == "server" else set()
    if any(part.args.teacher_placement == "server" for part in setup.apart.values()):
        served.add("teacher")
    return Spending(student, teachers, trained, bool(args.gradient_checkpointing), peak, frozenset(served))

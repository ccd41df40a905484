"""What grows with a run's tokens: more rows a step, or longer ones; which part takes the time, and what the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsdkd.costs import GIB, GPU, PARTS, StepShape, flops_of, rollout_bytes
from tsdkd.preflight.memory import MOST_TOKENS, Memory, Placement, Run, memory_of

FACTORS = (1, 10, 100, 1000)


def shape_of(run: Run, gpus: int) -> StepShape:
    """A run's optimizer step over all its GPUs, every text as long as may be."""
    whole, trained = run.trained
    rows = run.rows * run.accumulation * gpus
    return StepShape(rows, run.length - run.completion, run.completion, run.checkpointing, trained / whole)


def moved_by(run: Run, gpus: int, shape: StepShape) -> dict[str, float]:
    """The bytes that each part reads, over all GPUs: weights for every pass, the heads for every chunk of tokens."""
    ours, share = run.sizes[0], 1.0 if run.averaged else 1 / max(1, len(run.readers))
    width = (run.autocast or run.student_dtype).itemsize
    their_width = width if run.itself else run.teacher_dtype.itemsize
    heads = ours.head * width + sum(share * size.head * their_width for size in run.readers)
    written = rollout_bytes(ours, shape, width, gpus) * gpus
    passes = shape.rows / run.read_together
    return {
        "rollout": written * run.written if run.written_here else 0.0,
        "teacher": sum(share * size.parameters * their_width for size in run.readers) * passes,
        "student": 3.0 * ours.parameters * width * shape.rows / run.rows,
        "loss": heads * shape.tokens / (run.chunk or MOST_TOKENS),
    }


def flops_by_part(run: Run, shape: StepShape) -> dict[str, float]:
    """A step's FLOPs; of several teachers each reads its share of the rows, or all where they are averaged."""
    ours, theirs = run.read or (shape.completion, shape.completion)
    made = flops_of(run.sizes[0], None, dataclasses.replace(shape, completion=ours))
    for size in run.readers:
        share = 1.0 if run.averaged else 1 / len(run.readers)
        made["teacher"] += share * size.forward_flops(shape.prompt + theirs, shape.rows)
        made["loss"] += share * 2 * size.head * shape.rows * theirs
    writers = (run.sizes[0], *(run.readers if run.both_write else ()))
    written = sum(size.writing_flops(shape.prompt + shape.completion, shape.rows, shape.tokens) for size in writers)
    made["rollout"] = written * run.written if run.written_here else 0.0
    return made


@dataclass(frozen=True)
class Grown:
    """A run with more tokens a step.

    Attributes:
        how: `rows`, more of them accumulated; or `length`, of prompt and completion.
        factor: times as many.
        tokens: trained on in a step.
        seconds: of each part at best, or its FLOPs where the GPUs' speed is not known.
        memory: of the placement on each GPU.
        beyond: a model's context is shorter.
    """

    how: str
    factor: int
    tokens: float
    seconds: dict[str, float]
    memory: Memory
    beyond: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the time."""
        whole = sum(self.seconds.values())
        return {part: value / whole for part, value in self.seconds.items()}


def growth(run: Run, where: Placement, gpus: int, gpu: GPU, factors: Sequence[int] = FACTORS) -> list[Grown]:
    """A run on these GPUs with more rows a step, and with longer ones."""
    made = []
    for how in ("rows", "length"):
        for factor in factors:
            more: dict[str, Any] = {"accumulation": run.accumulation * factor}
            if how == "length":
                read = None if run.read is None else tuple(factor * tokens for tokens in run.read)
                more = {"length": run.length * factor, "completion": run.completion * factor, "read": read}
            grown = run.but(**more)
            shape = shape_of(grown, gpus)
            flops, moved = flops_by_part(grown, shape), moved_by(grown, gpus, shape)
            seconds = {part: gpu.seconds(flops[part] / gpus, moved[part] / gpus) for part in PARTS} if gpu.tflops else flops
            memory = memory_of(grown, where, gpus, gpu.memory * GIB)
            contexts = [each.get_text_config() for each in (run.student, *run.teachers)]
            longest = min(
                (n for text in contexts if (n := getattr(text, "max_position_embeddings", None))), default=grown.length
            )
            made.append(Grown(how, factor, shape.tokens, seconds, memory, grown.length > longest))
    return made


def growth_table(made: Sequence[Grown], has_speed: bool) -> list[str]:
    """Its lines, for a terminal."""
    what = "share of the time at best" if has_speed else "share of the FLOPs"
    shares, largest = f"{what}: {', '.join(PARTS)}", "what it holds the most of"
    lines = [f"{'more tokens a step':<20}{'tokens':>12}  {shares:<58}{'tokens/s':>10}{'GiB':>9}   {largest}"]
    for one in made:
        name = "as it is" if one.factor == 1 else f"{one.factor} × the {one.how}{' †' if one.beyond else ''}"
        if one.factor == 1 and one.how == "length":
            continue
        shares = ", ".join(f"{one.shares[part]:.0%}" for part in PARTS)
        speed = f"{one.tokens / sum(one.seconds.values()):>10,.0f}" if has_speed else f"{'':>10}"
        largest = max(one.memory.parts, key=lambda part: one.memory.parts[part])
        lines.append(f"  {name:<18}{one.tokens:>12,.0f}  {shares:<58}{speed}{one.memory.peak / GIB:>9.1f}   {largest}")
    return [*lines, "  † longer than a model's context"] if any(one.beyond for one in made) else lines

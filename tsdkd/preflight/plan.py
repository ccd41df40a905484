"""Does it fit, and what does it cost: a run's placements on named GPUs, from configurations alone."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from tsdkd.costs import GIB, GPU, backward_factor, known_gpus
from tsdkd.preflight.growth import Grown, flops_by_part, growth, growth_table, moved_by, shape_of
from tsdkd.preflight.memory import Memory, Placement, Run, memory_of

USABLE = 0.94  # of a GPU's memory; the rest is CUDA's own, and what an allocator cannot use


@dataclass(frozen=True)
class GPUs:
    """So many GPUs of a kind, as `8xH100` or, by memory in GiB, `8x80`."""

    count: int
    each: GPU

    @classmethod
    def of(cls, text: str) -> GPUs:
        """From a command line.

        Raises:
            ValueError: a text that is none, or a name that is not known.

        Example:
            >>> GPUs.of("8x80").each.memory, GPUs.of("2xA100").each.name, GPUs.of("H200").count
            (80.0, 'A100-80GB', 1)
        """
        found = re.fullmatch(r"(?:(\d+)\s*[xX×]\s*)?([\w. -]+?)\s*(?:GiB|GB)?", text.strip())
        names = ", ".join(known_gpus())
        if found is None or found.group(1) == "0":
            raise ValueError(f"--gpus {text!r}: pass a number and a GPU, 8xH100, or its memory in GiB, 8x80. Known: {names}.")
        count, what = int(found.group(1) or 1), found.group(2)
        ends_with = [name for name in known_gpus() if name.endswith(f"-{what}")]  # 4090 is no memory
        if re.fullmatch(r"\d+(\.\d+)?", what) and not ends_with:
            if not float(what):
                raise ValueError(f"--gpus {text!r}: a GPU of no memory.")
            return cls(count, GPU(f"{float(what):g} GiB", float(what), 0.0, 0.0))
        named = what.upper().replace(" ", "-").removeprefix("NVIDIA-")
        bare = lambda name: name.upper().replace("-", "")  # noqa: E731
        ends = lambda name: bare(name).startswith(bare(named)) or bare(name).endswith(bare(named))  # noqa: E731
        like = [gpu for name, gpu in known_gpus().items() if len(named) > 2 and ends(name)]
        if not like:
            raise ValueError(f"--gpus {text!r}: {what} is not known; known: {names}. Or give its memory: {count}x80.")
        return cls(count, max(like, key=lambda gpu: gpu.memory))


@dataclass(frozen=True)
class Option:
    """A placement, what it takes, and how it is started."""

    placement: Placement
    memory: Memory
    fits: bool
    command: str


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        run, gpus: what was asked.
        options: the placements, those that fit first, simplest first.
        flops: of a step by part.
        moved: bytes of weights, caches and heads that each part reads, of all GPUs.
        seconds: the roofline of each part on these GPUs; empty where their speed is not known.
        knob: the one change with which the nearest placement that does not fit would; None where all fit or none helps.
        rooflines: the same of each GPU that is known, as many of them.
        otherwise: each option's memory with layers recomputed where this run keeps their activations, and the other way.
        growth: with more tokens a step.
    """

    run: Run
    gpus: GPUs
    options: Sequence[Option]
    flops: dict[str, float]
    moved: dict[str, float]
    seconds: dict[str, float]
    knob: tuple[Placement, str] | None
    rooflines: dict[str, dict[str, float]]
    otherwise: Sequence[Memory]
    growth: Sequence[Grown]

    @property
    def run_flops(self) -> float:
        """What the student's FLOPs change by where its layers are recomputed, or no longer."""
        whole, trained = self.run.trained
        now, then = (backward_factor(trained / whole, on) for on in (self.run.checkpointing, not self.run.checkpointing))
        return then / now - 1

    @property
    def best(self) -> Option | None:
        """The simplest placement that fits."""
        return next((option for option in self.options if option.fits), None)


def placements(gpus: int) -> list[Placement]:
    """Every placement that can be started on so many GPUs, the simplest first."""
    if gpus == 1:
        whole = [Placement("whole", teacher) for teacher in ("local", "swap", "server")]
        return [*whole[:2], Placement("whole", "swap", swap_optimizer=True), whole[2]]
    made = [Placement(student, teacher) for student in ("whole", "zero2", "zero3") for teacher in ("local", "zero3", "server")]
    return [*made[:2], Placement("whole", "swap"), *made[2:]]


def _changes(run: Run) -> list[tuple[str, Run]]:
    """What one may change, the cheapest first."""
    made: list[tuple[str, Run]] = []
    if not run.checkpointing:
        made.append(("gradient_checkpointing: true", run.but(checkpointing=True)))
    if run.teacher_tokens is not None and run.read_together > 1:
        made.append((f"teacher_batch_tokens: {run.length}", run.but(teacher_tokens=run.length)))
    elif run.read_together > 1:
        made.append(("teacher_batch_size: 1", run.but(teacher_rows=1)))
    for rows in (rows for rows in range(run.rows - 1, 0, -1) if run.rows % rows == 0):
        accumulated = run.rows * run.accumulation // rows
        told = f"per_device_train_batch_size: {rows} and gradient_accumulation_steps: {accumulated}"
        made.append((told, run.but(rows=rows, accumulation=accumulated)))
    if run.vllm is not None and not run.vllm_sleeps:
        made.append(("vllm_enable_sleep_mode: true", run.but(vllm_sleeps=True)))
    if run.adapt is None and find_spec("peft") is not None:
        made.append(("use_peft: true, lora_target_modules: all-linear (an adapter)", run.but(adapt=_adapted)))
    if run.student_dtype == torch.float32 and run.adapt is None:
        made.append(("optim: adamw_8bit", run.but(optimizer="adamw_8bit")))
        made.append(("dtype: bfloat16 (the student's; updates below its unit are lost)", run.but(student_dtype=torch.bfloat16)))
    return made


def _adapted(model: Any) -> Any:
    """A model with a LoRA adapter on all its linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def plan(run: Run, gpus: GPUs, command: Callable[[Placement, int], str] | None = None, grows: bool = False) -> Plan:
    """A run on these GPUs.

    Args:
        grows: say what more tokens a step would do, too.
        command: from a placement and the number of GPUs to the command that starts it.
    """
    room = gpus.each.memory * GIB
    told = command or (lambda placement, count: "")
    made = []
    for where in placements(gpus.count):
        if not run.teachers and where.teacher != "local":
            continue
        memory = memory_of(run, where, gpus.count, room)
        made.append(Option(where, memory, memory.peak <= USABLE * room, told(where, gpus.count)))
    made.sort(key=lambda option: not option.fits)
    shape = shape_of(run, gpus.count)
    flops, moved = flops_by_part(run, shape), moved_by(run, gpus.count, shape)

    def seconds(gpu: GPU) -> dict[str, float]:
        return {part: gpu.seconds(flops[part] / gpus.count, moved[part] / gpus.count) for part in flops}

    rooflines = {name: seconds(gpu) for name, gpu in known_gpus().items()}
    own = seconds(gpus.each) if gpus.each.tflops else {}
    best = made[0]
    changed = run.but(checkpointing=not run.checkpointing)
    other = [memory_of(changed, option.placement, gpus.count, room) for option in made]
    more = growth(run, best.placement, gpus.count, gpus.each) if grows else []
    return Plan(run, gpus, made, flops, moved, own, _knob(run, gpus, made, room), rooflines, other, more)


def _knob(run: Run, gpus: GPUs, options: Sequence[Option], room: float) -> tuple[Placement, str] | None:
    """The one change that lets one of those that do not fit fit, the nearest first."""
    lacking = [option for option in options if not option.fits]
    for option in sorted(lacking, key=lambda option: option.memory.peak):
        for told, changed in _changes(run):
            if memory_of(changed, option.placement, gpus.count, room).peak <= USABLE * room:
                return option.placement, told
    return None


# ---------------------------------------------------------------------- what is told


def table(made: Plan) -> str:
    """The plan in words, for a terminal."""
    run, gpus = made.run, made.gpus
    theirs, (whole, trained) = run.sizes[1], run.trained
    each = ", ".join(_count(size.parameters) for size in theirs)
    teacher = f"{each} parameters, {_kind(run.teacher_dtype)}" if theirs else "none"
    teacher = f"the student itself ({run.itself})" if run.itself else teacher
    own = "" if trained == whole else f", {_count(trained)} trained"
    many = f"{gpus.count} GPU{'s' if gpus.count > 1 else ''}"
    again = ", layers recomputed" if run.checkpointing else ""
    room = f"of whose {gpus.each.memory:g} GiB {USABLE * gpus.each.memory:.1f} are counted on"
    lines = [
        f"student     {_count(whole)} parameters, {_kind(run.student_dtype)}{own}; {run.optimizer}",
        f"teacher     {teacher}",
        f"step        {run.rows} × {run.accumulation} accumulated × {many}, texts of up to {run.length} tokens, "
        f"{run.completion} of them completion{again}",
        f"GPUs        {gpus.count} × {gpus.each.name}, {room}",
        "",
        f"{'placement':<44}{'step 1':>9}{'step 2':>9}   GiB on each GPU; fullest while",
    ]
    for option in made.options:
        first, second = (peak / GIB for peak in option.memory.peaks)
        mark = "fits" if option.fits else "TOO MUCH"
        lines.append(f"{option.placement!s:<44}{first:>9.1f}{second:>9.1f}   {mark}; {_PHASES[option.memory.fullest]}")
    shown = made.options[0]
    lines += ["", f"of {shown.placement}, GiB:"]
    lines += [f"  {name:<26}{size / GIB:>9.2f}" for name, size in shown.memory.parts.items() if size]
    within = [f"{name} {size / GIB:.2f}" for name, size in shown.memory.within.items() if size]
    lines += textwrap.wrap(
        f"within them, some at other times: {', '.join(within)}", 118, initial_indent="  ", subsequent_indent="    "
    )
    how = "kept" if run.checkpointing else "recomputed (gradient_checkpointing)"
    each = ", ".join(f"{memory.peak / GIB:.1f}" for memory in made.otherwise)
    told = f"with layers' activations {how} these would take, in turn, {each}; the student {made.run_flops:+.0%} FLOPs"
    lines += ["", *textwrap.wrap(told, 118)]
    lines += ["", f"{'a step':<12}{'PFLOP':>9}{'GB read':>10}" + (f"{'seconds at best':>18}" if made.seconds else "")]
    for name, count in made.flops.items():
        more = f"{made.seconds[name]:>18.2f}" if made.seconds else ""
        lines.append(f"  {name:<10}{count / 1e15:>9.2f}{made.moved[name] / 1e9:>10.0f}{more}")
    if not made.seconds:
        lines.append(f"  (no speed is known of {gpus.each.name}: name the GPU for seconds)")
    lines += ["", f"{gpus.count} × at best, seconds: " + ", ".join(made.flops)]
    for name, parts in made.rooflines.items():
        lines.append(f"  {name:<12}{', '.join(f'{value:.2f}' for value in parts.values()):<32}{sum(parts.values()):>9.2f}")
    if made.growth:
        lines += ["", *growth_table(made.growth, bool(made.seconds))]
    if made.best is not None and made.best.command:
        lines += ["", "start it with", made.best.command]
    if made.best is None:
        lines += ["", "No placement fits."]
    if made.knob is not None:
        where, told = made.knob
        lines += ["", f"{where} would fit with {told}."]
    return "\n".join(lines)


_PHASES = {
    "rollout": "completions are written",
    "teacher": "the teacher reads",
    "student": "the student learns",
    "optimizer": "the optimizer steps",
}


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as data: bytes, FLOPs and seconds."""
    return {
        "gpus": {"count": made.gpus.count, **dataclasses.asdict(made.gpus.each)},
        "student": dataclasses.asdict(made.run.sizes[0]),
        "teachers": [dataclasses.asdict(size) for size in made.run.sizes[1]],
        "placements": [
            {
                "student": option.placement.student,
                "teacher": option.placement.teacher,
                "swap_optimizer": option.placement.swap_optimizer,
                "fits": option.fits,
                "parts": option.memory.parts,
                "within": option.memory.within,
                "peak_with_checkpointing_otherwise": otherwise.peak,
                "step_1": option.memory.phases[0],
                "step_2": option.memory.phases[1],
                "peaks": list(option.memory.peaks),
                "command": option.command,
            }
            for option, otherwise in zip(made.options, made.otherwise, strict=True)
        ],
        "flops": made.flops,
        "bytes": made.moved,
        "seconds": made.seconds,
        "rooflines": made.rooflines,
        "checkpointing": made.run.checkpointing,
        "growth": [
            {
                "how": one.how,
                "factor": one.factor,
                "tokens": one.tokens,
                "beyond_context": one.beyond,
                "shares": one.shares,
                "peak": one.memory.peak,
                "parts": one.memory.parts,
            }
            for one in made.growth
        ],
        "knob": None if made.knob is None else {"placement": str(made.knob[0]), "change": made.knob[1]},
    }


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The memory of a run on each GPU: what stays, what comes and goes, and the most at once, in every placement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tsdkd.costs import ModelSize
from tsdkd.preflight.dry import Pass, reading_pass, student_pass
from tsdkd.trainers.sizes import empty_model, size_of

# Bytes of an optimizer's state for each trained parameter, in units of the parameter's own dtype, or in bytes.
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_apex_fused": 2, "sgd": 0, "adafactor": 0, "lion_32bit": 1}
_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0, "paged_adamw": 0, "lion_8bit": 1}


@dataclass(frozen=True)
class Run:
    """What of a run its memory depends on.

    Args:
        student: a configuration.
        teacher: a configuration, several in a tuple, or None of none.
        student_dtype, teacher_dtype: of their weights.
        averaged: of several teachers all read every row; otherwise each its own.
        itself: the student teaches itself, as it was at the `start`, `live`, or `ema`.
        by_autograd: the loss's divergence is differentiated by autograd, over each model's own vocabulary.
        autocast: the dtype of mixed precision; None is none.
        rows, accumulation: of a micro-batch, and how many accumulate.
        teacher_rows: of a forward pass of the teacher.
        length, completion: tokens of prompt and completion together, and of the completion.
        checkpointing: the student's layers are computed again in the backward pass.
        optimizer: transformers' name.
        adapt: puts an adapter on a model; None: all weights are trained.
        vllm: the share of a GPU that a vLLM of this process takes; None: transformers writes.
        vllm_sleeps: it gives that back while a step is computed.
        chunk, block: tokens whose logits stand in memory at a time, and whose float32 copies do; None: what the loss chooses on
            a GPU from the memory that is free, and all of them.
        attention: the student's implementation.
        teacher_offloaded: a `zero3` teacher's shares are in CPU memory.
        teacher_tokens: in place of `teacher_rows`, tokens of a pass.
        student_bits, teacher_bits: 4 or 8 of weights that bitsandbytes quantizes, below the head and beside the embedding.
        written: the share of completions that the student writes; `both_write`: the teacher's forward passes with its own.
        written_here: on these GPUs, not by a server.
        read: tokens of a completion that student and teacher are read at, where it is not all.
        made: what has been made of the configurations; `but` shares it.
        bucket: gradients that DeepSpeed exchanges at a time (`reduce_bucket_size`).
    """

    student: Any
    teacher: Any
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = torch.bfloat16
    rows: int = 1
    accumulation: int = 1
    teacher_rows: int = 1
    length: int = 1024
    completion: int = 512
    checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    adapt: Callable[[Any], Any] | None = None
    vllm: float | None = None
    vllm_sleeps: bool = True
    chunk: int | None = None
    block: int | None = None
    attention: str | None = None
    averaged: bool = False
    itself: str | None = None
    by_autograd: bool = False
    bucket: int = 5 * 10**8
    teacher_offloaded: bool = False
    teacher_tokens: int | None = None
    student_bits: int | None = None
    teacher_bits: int | None = None
    written: float = 1.0
    both_write: bool = False
    written_here: bool = True
    read: tuple[int, int] | None = None
    made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def _once(self, make: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """What a function makes of configurations, once for a run and all that it is changed to."""
        key = make, tuple(map(id, given)), tuple(sorted((name, value) for name, value in more.items() if value is not None))
        if key not in self.made:
            self.made[key] = make(*given, **more), given  # what is held keeps its id
        return self.made[key][0]

    @property
    def read_together(self) -> int:
        """Rows of a teacher's forward pass."""
        rows = self.teacher_rows if self.teacher_tokens is None else max(1, self.teacher_tokens // self.length)
        return min(rows, self.rows * self.accumulation)

    @property
    def teachers(self) -> tuple[Any, ...]:
        """The configurations of models beside the student."""
        if self.teacher is None:
            return ()
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    @property
    def sizes(self) -> tuple[ModelSize, tuple[ModelSize, ...]]:
        """The student's, and its teachers'."""
        return self._once(size_of, self.student), tuple(self._once(size_of, each) for each in self.teachers)

    @property
    def readers(self) -> tuple[ModelSize, ...]:
        """What reads in the teacher's part of a step."""
        return (self.sizes[0],) if self.itself else self.sizes[1]

    @property
    def trained(self) -> tuple[int, int]:
        """The parameters of the student with its adapter, and those of them that are trained."""
        return self._once(_trained, self.student, self.adapt)

    @property
    def student_pass(self) -> Pass:
        """A micro-batch's forward, loss and backward."""
        return self._once(
            student_pass,
            self.student,
            rows=self.rows,
            length=self.length,
            completion=self.completion,
            dtype=self.student_dtype,
            autocast=self.autocast,
            checkpointing=self.checkpointing,
            accumulates=self.accumulation > 1,
            adapt=self.adapt,
            attention=self.attention,
        )

    @property
    def teacher_pass(self) -> Pass:
        """The teacher's forward pass; of several the one that takes the most."""
        rows = self.read_together
        each = [(config, self.teacher_dtype) for config in self.teachers] or [(self.student, self.student_dtype)]
        passes = [self._once(reading_pass, config, rows=rows, length=self.length, dtype=dtype) for config, dtype in each]
        return max(passes, key=lambda one: one.peak)

    def but(self, **changes: Any) -> Run:
        """The same with something else."""
        return dataclasses.replace(self, **changes)


def _trained(student: Any, adapt: Callable[[Any], Any] | None) -> tuple[int, int]:
    """Parameters, and those with a gradient."""
    with torch.device("meta"):
        model = empty_model(student)
        model = model if adapt is None else adapt(model)
    each = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in each), sum(size for size, has_gradient in each if has_gradient)


@dataclass(frozen=True)
class Placement:
    """Where the two models are.

    Args:
        student: `whole` in each process, or in shares by DeepSpeed (`zero2`: gradients and optimizer; `zero3`: weights, too).
        teacher: as `teacher_placement`.
        swap_optimizer: of a swapped teacher.
    """

    student: str
    teacher: str
    swap_optimizer: bool = False

    def __str__(self) -> str:
        ours = {"whole": "whole student", "zero2": "student ZeRO-2", "zero3": "student ZeRO-3"}[self.student]
        more = " with the optimizer" if self.swap_optimizer else ""
        return f"{ours}, teacher {self.teacher}{more}"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        parts: by name, what there is: weights, gradients, optimizer, teacher, its hidden states, activations, …
        phases: of step 1 and of step 2, in which the optimizer has its states, the most at once of each phase.
        within: of some parts what they are made of: layers' activations, the loss's chunk, keys and values, gathered layers.
    """

    parts: dict[str, int]
    phases: tuple[dict[str, int], dict[str, int]]
    within: dict[str, int] = field(default_factory=dict)

    @property
    def peaks(self) -> tuple[int, int]:
        """The most at once in step 1 and in step 2."""
        first, second = (max(phase.values()) for phase in self.phases)
        return first, second

    @property
    def peak(self) -> int:
        return max(self.peaks)

    @property
    def fullest(self) -> str:
        """The phase that takes the most."""
        return max(self.phases[1], key=self.phases[1].__getitem__)


def optimizer_bytes(run: Run, trained: int, shards: bool) -> int:
    """What an optimizer keeps of its trained parameters.

    Raises:
        ValueError: one whose states are not known here.
    """
    width = run.student_dtype.itemsize
    if shards:  # DeepSpeed keeps float32 weights and two moments, whatever it is given
        return trained * 12
    if run.optimizer in _BYTES:
        return trained * _BYTES[run.optimizer]
    if run.optimizer not in _STATES:
        raise ValueError(
            f"what optim={run.optimizer} keeps of each parameter is not known here; known: {', '.join([*_STATES, *_BYTES])}."
        )
    return trained * width * _STATES[run.optimizer]


def memory_of(run: Run, where: Placement, gpus: int, gpu_bytes: float = float("inf")) -> Memory:
    """The memory of a run on each of so many GPUs.

    Args:
        gpu_bytes: of a GPU, of which vLLM takes its share.
    """
    ours, theirs = run.sizes
    whole, trained = run.trained
    shards = gpus if where.student != "whole" else 1
    width = run.student_dtype.itemsize
    if where.student != "whole" and run.autocast is not None:  # DeepSpeed holds the weights in the dtype of mixed precision
        width = run.autocast.itemsize
    weights, gradients = whole * width - _saved(ours, width, run.student_bits), trained * width
    layer = 2 * ours.largest_layer * width + ours.head * width  # two layers at a time, and the head while the loss is computed
    held = weights // gpus + layer if where.student == "zero3" else weights
    kept_gradients = gradients // shards
    buckets = 0
    if gpus > 1:  # DDP's own copy, or DeepSpeed's, which it takes whole whatever there is to put in
        buckets = gradients if where.student == "whole" else run.bucket * width
    optimizer = optimizer_bytes(run, trained, where.student != "whole") // shards
    parts = {"student's weights": held, "gradients": kept_gradients, "gradients' buckets": buckets, "optimizer": optimizer}

    away = reads = hidden = gathered = 0
    if run.readers:
        size = run.teacher_dtype.itemsize
        head = sum(each.head for each in theirs) * size
        teacher = sum(each.parameters * size - _saved(each, size, run.teacher_bits) for each in theirs)
        if run.averaged:
            teacher, head = teacher + head, 2 * head  # the heads stand side by side in one
        hidden = run.rows * run.accumulation * run.completion * _width(run) * size
        if run.itself:
            size = run.student_dtype.itemsize
            kept = max(size, 4) if run.itself == "ema" else size
            parts["teacher"], reads = 0 if run.itself == "live" else trained * kept, run.teacher_pass.peak
            hidden = run.rows * run.accumulation * run.completion * ours.hidden * size
        elif where.teacher == "zero3":
            gathered = 2 * max(each.largest_layer for each in theirs) * size
            share = 0 if run.teacher_offloaded else teacher // gpus
            parts["teacher"], reads = share + head, run.teacher_pass.peak + gathered
        elif where.teacher == "swap":
            parts["teacher"], away, reads = head, teacher - head, run.teacher_pass.peak
            hidden = 0  # they wait in CPU memory, and a micro-batch's come back
        elif where.teacher == "server":
            parts["teacher"] = head
        else:
            parts["teacher"], reads = teacher, run.teacher_pass.peak
        parts["teacher's hidden states"] = hidden
    step = run.student_pass
    resting = held + optimizer + parts.get("teacher", 0) + hidden + kept_gradients + buckets + step.forward
    loss = _loss_bytes(run, ours, theirs, gpu_bytes - resting)
    came = run.rows * run.completion * _width(run) * run.teacher_dtype.itemsize if run.readers else 0
    backward = step.peak - (0 if run.accumulation > 1 else step.gradients)  # the first backward pass makes the gradients
    activations = max(backward, step.forward + loss - (0 if run.accumulation > 1 else kept_gradients))
    rollout = _rollout(run, ours, gpu_bytes)
    if where.student == "zero3" and run.vllm is None and run.written_here:
        rollout += weights  # TRL gathers the whole student while it writes
    parts |= {"activations and loss": activations + came, "rollout": rollout}
    by_us = run.written and run.written_here and run.vllm is None
    within = {
        "activations": step.forward,
        "the loss's chunk": loss,
        "the teacher's states of a micro-batch": came,
        "keys and values": ours.kv_cache(run.rows * run.accumulation * run.length, run.student_dtype.itemsize) if by_us else 0,
        "the student's gathered layers": layer if where.student == "zero3" else 0,
        "the whole student, gathered to write": weights if where.student == "zero3" and by_us else 0,
        "the teacher's gathered layers": gathered,
        "the teacher's activations": run.teacher_pass.peak if run.readers and where.teacher != "server" else 0,
    }
    asleep = 0 if run.vllm is None or run.vllm_sleeps else int(run.vllm * gpu_bytes)

    def phases(states: int) -> dict[str, int]:
        base = held + states + asleep + parts.get("teacher", 0) + buckets
        made = {
            "rollout": base - asleep + rollout,
            "student": base + hidden + kept_gradients + activations + came,
            "optimizer": base - states + kept_gradients + optimizer,
        }
        if run.readers and where.teacher != "server":
            left = 0
            if where.teacher == "swap":
                left = held + (states if where.swap_optimizer else 0)
            made["teacher"] = base - left + away + reads + hidden
        return made

    return Memory(parts, (phases(0), phases(optimizer)), within)


MOST_TOKENS, _LEAST, _COPIES, _AUTOGRAD = 2048, 16, 6, 10  # as `fused.chunks`, `.tiles_torch`, `.run` have it on a GPU


_CANDIDATES, _SORTED = 320, 64  # ids of a token that candidates are sorted out of, ten tiles, and the bytes of each meanwhile


def _saved(size: ModelSize, width: int, bits: int | None) -> int:
    """Bytes that quantized weights do without: those of layers, not of head and embedding; with a scale for every 64."""
    layers = size.parameters - size.embedding - (0 if size.tied else size.head)
    return 0 if bits is None else int(layers * (width - bits / 8 - (4 / 64 if bits == 4 else 0)))


def _width(run: Run) -> int:
    """Numbers of a token's hidden state: of several teachers that read rows of their own the widest's, of an average all."""
    widths = [each.hidden for each in run.readers]
    return sum(widths) if run.averaged else max(widths)


def _loss_bytes(run: Run, ours: ModelSize, theirs: Sequence[ModelSize], free: float) -> int:
    """What the fused loss takes for a while: a chunk's logits of both models, and float32 copies of them."""
    sizes = [ours.vocab, *(each.vocab for each in theirs)]
    vocab = max(sizes) if run.by_autograd else min(sizes)
    width = (run.autocast or run.student_dtype).itemsize
    copies = _AUTOGRAD if run.by_autograd else _COPIES
    chunk = run.chunk
    if chunk is None:
        buffers = 2 + (_AUTOGRAD if run.by_autograd else 0)
        affordable = MOST_TOKENS if free == float("inf") else int(max(0, free) // 10 // (buffers * vocab * width))
        chunk = max(_LEAST, min(MOST_TOKENS, affordable))
    chunk = min(chunk, run.rows * run.completion)
    block = min(chunk, run.block or chunk)
    candidates = block * min(_CANDIDATES, -(-vocab // 32) * 32) * _SORTED
    return vocab * ((2 if run.readers else 1) * chunk * width + copies * block * 4) + candidates


def _rollout(run: Run, ours: ModelSize, gpu_bytes: float) -> int:
    """What writing the completions of a step takes beside the student."""
    if not run.written_here or not run.written:
        return 0
    if run.vllm is not None:
        return int(run.vllm * gpu_bytes) if gpu_bytes < float("inf") else 0
    width = (run.autocast or run.student_dtype).itemsize
    rows = run.rows * run.accumulation
    cache = ours.kv_cache(rows * run.length, run.student_dtype.itemsize)
    logits = 4 * rows * ours.vocab * 4  # scores, sorted, their softmax, its draw
    return int(cache * (1 + 1 / max(1, ours.layers)) + logits + rows * ours.hidden * width)

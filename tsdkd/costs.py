"""What a run costs, counted: the FLOPs and the bytes of a step by part, and what stays on a GPU. Arithmetic alone, no torch.

A multiply-add is two FLOPs. Counts are of products alone (attention's too, causal); what a GPU does beside them is small.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
PARTS = ("rollout", "teacher", "student", "loss")  # of a step


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes, from its configuration.

    Attributes:
        parameters: all of them, each once (a tied head is the embedding).
        active: of them those that a token passes: of a mixture of experts its share of the experts.
        embedding: rows times width of the table of inputs.
        head: of the head; the same parameters where `tied`.
        largest_layer: parameters of the largest layer, which ZeRO-3 gathers whole.
        vocab, hidden, layers, heads, kv_heads, head_dim: as in the configuration.
        tied: whether head and embedding are one.
    """

    parameters: int
    active: int
    embedding: int
    head: int
    largest_layer: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def backbone(self) -> int:
        """Parameters that multiply a token's state below the head."""
        return self.active - self.embedding - (0 if self.tied else self.head)

    def kv_cache(self, tokens: int, width: int) -> int:
        """Bytes of the keys and values of so many tokens, `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width

    def forward_flops(self, lengths: float, rows: float) -> float:
        """FLOPs of reading `rows` texts of `lengths` tokens, without the head."""
        attention = 2 * self.layers * self.heads * self.head_dim * lengths**2  # causal: half of the square, twice
        return rows * (2 * self.backbone * lengths + attention)

    def writing_flops(self, lengths: float, rows: float, drawn: float) -> float:
        """FLOPs of writing `drawn` tokens of texts that are so long at their end, its head with them."""
        return self.forward_flops(lengths, rows) + 2 * self.head * drawn


@dataclass(frozen=True)
class StepShape:
    """An optimizer step, over all processes.

    Attributes:
        rows: completions.
        prompt, completion: tokens of each, a mean.
        checkpointing: the student's layers are computed once more in the backward pass.
        trained: share of the student's parameters that have a gradient; an adapter's backward pass computes no gradient of
            the other weights.
    """

    rows: int
    prompt: float
    completion: float
    checkpointing: bool = False
    trained: float = 1.0

    @property
    def tokens(self) -> float:
        """Trained tokens."""
        return self.rows * self.completion


# Products of [tokens, vocab, hidden]: a head's forward; of the student's two more, with respect to states and weight.
_STUDENT_HEAD, _TEACHER_HEAD = 3, 1


def backward_factor(trained: float, checkpointing: bool) -> float:
    """What a student's forward and backward pass are of its forward pass: `trained` is the share of its parameters that have a
    gradient; of frozen weights none is computed."""
    return 1.0 + (1.0 + (1.0 if trained > 0.5 else trained)) + (1.0 if checkpointing else 0.0)


def head_products(trained: float) -> int:
    """Products of states and head in the student's part of the loss: forward, the states' gradient, and the weight's."""
    return _STUDENT_HEAD if trained > 0.5 else _STUDENT_HEAD - 1


def flops_of(student: ModelSize, teacher: ModelSize | None, shape: StepShape) -> dict[str, float]:
    """The FLOPs of a step by part: `rollout`, `teacher`, `student`, `loss`.

    Example:
        >>> small = ModelSize(100, 100, 20, 20, 30, 5, 4, 2, 1, 1, 4, tied=True)
        >>> [round(count) for count in flops_of(small, None, StepShape(1, 1, 1)).values()]
        [424, 0, 1152, 120]
    """
    length = shape.prompt + shape.completion
    read = student.forward_flops(length, shape.rows)
    loss = head_products(shape.trained) * 2 * student.head * shape.tokens
    if teacher is not None:
        loss += _TEACHER_HEAD * 2 * teacher.head * shape.tokens
    return {
        "rollout": student.writing_flops(length, shape.rows, shape.tokens),
        "teacher": 0.0 if teacher is None else teacher.forward_flops(length, shape.rows),
        "student": read * backward_factor(shape.trained, shape.checkpointing),
        "loss": loss,
    }


def rollout_bytes(student: ModelSize, shape: StepShape, width: int, gpus: int = 1) -> float:
    """Bytes that each GPU reads for writing: all weights once a token (of a mixture those that some row of its batch may take),
    all its rows at a time, and their keys and values."""
    cache = shape.rows * shape.completion * student.kv_cache(1, width) * (shape.prompt + shape.completion / 2)
    touched = min(student.parameters, student.active * shape.rows / gpus)
    return shape.completion * touched * width + cache / gpus


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker states it.

    Attributes:
        memory: GiB.
        tflops: dense bf16 products, 10¹² FLOPs a second.
        bandwidth: GB (10⁹ bytes) a second.
        source: where these stand.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    source: str = ""

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: the longer of computing and moving."""
        return max(flops / (self.tflops * 1e12), moved / (self.bandwidth * 1e9))


@functools.cache
def known_gpus() -> dict[str, GPU]:
    """The GPUs that are known by name."""
    rows = json.loads(Path(__file__).with_name("gpus.json").read_text())
    return {row["name"]: GPU(**row) for row in rows}


def gpu_named(name: str) -> GPU | None:
    """The GPU whose name a device's own holds (`NVIDIA H100 80GB HBM3`); of several the longest.

    Example:
        >>> gpu_named("NVIDIA A100-SXM4-80GB").name, gpu_named("Tesla T4")
        ('A100-80GB', None)
    """
    told = set(name.upper().replace("-", " ").split())
    if told & {"PCIE", "NVL", "LAPTOP", "MOBILE"}:  # slower than those of the name that are known
        return None
    found = [gpu for gpu in known_gpus().values() if told >= set(gpu.name.upper().split("-"))]
    return max(found, key=lambda gpu: len(gpu.name), default=None)

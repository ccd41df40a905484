"""The places where a teacher may live, by name, and how it gets there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.teachers import LocalTeacher, ServerTeacher, Teacher, ZeRO3Teacher, gathered, vocabulary_size
from tsdkd.teachers.batches import Batches, check_padding_free
from tsdkd.teachers.heads import check_head
from tsdkd.teachers.server import head_of_checkpoint
from tsdkd.teachers.swap import SwapTeacher

# A short text with words and numbers, on which a served teacher is compared with its head.
_PROBE = "The quick brown fox has 15 pens and buys 5 more. How many pens now?"


@dataclass(frozen=True)
class Request:
    """What is to be placed, and what the places need.

    Args:
        model: the teacher's name or folder, or a loaded model.
        load: from a name to a whole model.
        load_shares: from a name or a model to one of which each process holds a share, and its DeepSpeed configuration.
        batch_size: which rows a forward pass reads.
        device: where the loss is computed.
        autocast: the mixed-precision context of its forward pass.
        student_dtype: of the student's head.
        low_precision: whether the run computes in less than float32.
        urls, revision, trust_remote_code: of a served teacher.
        room: of a swapped teacher, a context in which the student has given up its part of the device's memory.
    """

    model: Any
    load: Callable[[str], Any]
    load_shares: Callable[[Any], tuple[Any, dict[str, Any]]]
    batch_size: Batches
    device: torch.device
    autocast: Callable[[], Any]
    student_dtype: torch.dtype
    low_precision: bool = False
    urls: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    room: Callable[[], AbstractContextManager] = nullcontext

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of a teacher that reads in this process."""
        return {"pad_id": 0, "batch_size": self.batch_size, "device": self.device, "autocast": self.autocast}


@dataclass(frozen=True)
class Placed:
    """A teacher in its place.

    Attributes:
        teacher: what gives its hidden states.
        model: its model in this process, whole or a share; None elsewhere.
        vocab_size: the ids that its head scores.
        source: the checkpoint that its tokenizer comes with; empty where none is known.
        check: called with the student's tokenizer and the number of shared ids, refuses what it finds wrong.
    """

    teacher: Teacher
    model: Any
    vocab_size: int
    source: str
    check: Callable[[Any, int], None]


def _held(teacher: LocalTeacher, model: Any, low_precision: bool) -> Placed:
    def check(tokenizer: Any, vocab_size: int) -> None:
        check_head(model, "teacher", vocab_size, gathered)
        if Batches.of(teacher.batch_size).padding_free:
            read = lambda rollouts, batches: teacher.read_in(rollouts, batches, model.get_input_embeddings().weight.device)  # noqa: E731
            check_padding_free(read, "teacher", model, vocab_size, low_precision or next(model.parameters()).dtype.itemsize < 4)

    source = getattr(model.config, "_name_or_path", "")
    return Placed(teacher, model, vocabulary_size(model), source, check)


def local(request: Request) -> Placed:
    """Whole, in this process.

    Raises:
        ValueError: a model that was loaded in shares.
    """
    model = request.model
    if isinstance(model, str):
        model = request.load(model)
    elif any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
        raise ValueError(
            "the teacher was loaded in shares, under the student's DeepSpeed configuration (the training arguments "
            "were made first), and teacher_placement=local wants it whole: pass its name in place of the model, load "
            "it before the arguments are made, or pass teacher_placement=zero3."
        )
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(request.device)
    return _held(LocalTeacher(model, **request.reading), model, request.low_precision)


def zero3(request: Request) -> Placed:
    """A share of it in each process."""
    model, config = request.load_shares(request.model)
    return _held(ZeRO3Teacher(model, config, **request.reading), model, request.low_precision)


def server(request: Request) -> Placed:
    """Behind servers; its head alone is read here, and every server is asked one short text.

    Raises:
        ValueError: a model in place of its name.
    """
    name = request.model
    if not isinstance(name, str):
        raise ValueError(
            f"teacher_placement=server takes teacher_model as the name or folder of the served checkpoint, not a "
            f"{type(name).__name__}: its head is read from there."
        )
    where = request.revision, request.trust_remote_code
    head, norm = head_of_checkpoint(name, request.student_dtype, request.device, *where)
    exact = request.student_dtype == torch.float32 and not request.low_precision
    teacher = ServerTeacher(list(request.urls), head, rows=request.batch_size.rows, dtype="float32" if exact else "bfloat16")

    def check(tokenizer: Any, vocab_size: int) -> None:
        teacher.check(_PROBE, tokenizer(_PROBE, add_special_tokens=False)["input_ids"], norm)

    return Placed(teacher, None, head.size, name, check)


def swap(request: Request) -> Placed:
    """In CPU memory, and on the device only while it reads."""
    model = request.load(request.model) if isinstance(request.model, str) else request.model
    teacher = SwapTeacher(model, room=request.room, **request.reading)
    held = _held(teacher, model, request.low_precision)

    def check(tokenizer: Any, vocab_size: int) -> None:
        with teacher.up():
            held.check(tokenizer, vocab_size)

    return dataclasses.replace(held, check=check)


PLACEMENTS: dict[str, Callable[[Request], Placed]] = {"local": local, "zero3": zero3, "server": server, "swap": swap}


def place(where: str, request: Request) -> Placed:
    """A teacher in the place of that name."""
    return PLACEMENTS[where](request)

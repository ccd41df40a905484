"""A teacher sharded over all processes by DeepSpeed ZeRO-3, whatever the student runs under. The only file that uses deepspeed.

DeepSpeed is asked for an engine of its own, not accelerate's second plugin: that one has the student go through DeepSpeed as
well, and here it may stay on DDP.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsdkd.checks import Problem
from tsdkd.teachers.heads import head_of, last_hidden_state
from tsdkd.teachers.local import LocalTeacher
from tsdkd.types import Head

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextmanager
def gathered(*parameters: torch.Tensor | None) -> Iterator[None]:
    """Parameters that ZeRO-3 has sharded, whole on every process; others as they are. Every process must enter."""
    sharded = {id(p): p for p in parameters if hasattr(p, "ds_status")}.values()
    if not sharded:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # A tied head may be whole already, and sharding it here would take it from under the embedding.
    with deepspeed.zero.GatheredParameters([p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]):  # type: ignore
        yield


def zero3_config(given: dict[str, Any] | str | Path | None, dtype: torch.dtype, cpu_offload: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of a teacher of this dtype.

    Args:
        given: options by DeepSpeed's names, or a JSON file of them; what is missing is filled in.
        dtype: the teacher's.
        cpu_offload: keep each process's share in its CPU memory.

    Raises:
        ValueError: no such file, not JSON, or another stage than 3.
    """
    config: Any = copy.deepcopy(given) if isinstance(given, dict) else {}
    if isinstance(given, (str, Path)):
        try:
            config = json.loads(Path(given).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"teacher_deepspeed={str(given)!r} is no readable JSON file: {error}.") from error
    zero = config.setdefault("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(
            f"teacher_deepspeed={given!r}: it must be a mapping of DeepSpeed's options, its zero_optimization one too, e.g. "
            '{"zero_optimization": {"zero_hpz_partition_size": 8}}.'
        )
    # "auto" is what transformers would fill in for the student.
    config = {name: value for name, value in config.items() if value != "auto"}
    zero = config["zero_optimization"] = {name: value for name, value in zero.items() if value != "auto"}
    if zero.setdefault("stage", 3) != 3:
        raise ValueError(
            f"teacher_deepspeed asks for ZeRO stage {zero['stage']}; only stage 3 shards parameters, and a teacher has nothing "
            "else to shard. Leave the stage out, or use teacher_placement=local."
        )
    if cpu_offload:
        zero.setdefault("offload_param", {"device": "cpu", "pin_memory": torch.cuda.is_available()})
    # It would replace torch.nn.functional.linear in the whole process, the student's too, for a backward that a teacher lacks.
    zero.setdefault("memory_efficient_linear", False)
    config.setdefault("train_micro_batch_size_per_gpu", 1)  # DeepSpeed wants one, nothing here reads it
    for name in _NAMES.values():
        config[name] = {"enabled": name == _NAMES.get(dtype)}
    return config


class _Reader(nn.Module):
    """The root of DeepSpeed's hooks: a forward that ends at the last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor) -> torch.Tensor:
        return last_hidden_state(self.model, ids, mask, **more)


class ZeRO3Teacher(LocalTeacher):
    """A teacher of which each process holds a share; layers are gathered one after another while it reads.

    Every process must read as many batches as the others, which `hidden_of` sees to; the head is to be read under
    `gathered`.

    Args:
        model: a causal language model, whole or sharded while it was loaded.
        config: see `zero3_config`.
        others: as in `LocalTeacher`.

    Raises:
        ValueError: no process group, or no deepspeed.
    """

    writes = "not"

    def __init__(self, model: Any, config: dict[str, Any], **others: Any) -> None:
        super().__init__(model, **others)
        import deepspeed

        self._engine, *_ = deepspeed.initialize(model=_Reader(self.model), config=config)
        self._engine.eval()

    def close(self) -> None:
        """Give the shares' memory back. DeepSpeed keeps what it has hooked alive, so that dropping the teacher does not."""
        self._engine.destroy()
        for parameter in self.model.parameters():
            parameter.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def read(self, ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor) -> torch.Tensor:
        # Not the engine's own forward, which would switch the trainer's autocast off.
        there = {name: value.to(self.device) for name, value in more.items()}
        return self._engine.module(ids.to(self.device), None if mask is None else mask.to(self.device), **there)


def zero3_problems() -> Iterator[Problem]:
    """What keeps a teacher from being sharded here: DeepSpeed is missing, or processes do not know each other."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        yield Problem(
            f"teacher_placement=zero3 needs deepspeed, which cannot be imported ({error})", do="pip install 'tsdkd[deepspeed]'"
        )
    if not torch.distributed.is_initialized():
        yield Problem(
            "teacher_placement=zero3 shards the teacher over the processes of a launcher, and none started this one",
            do="run accelerate launch (or torchrun --nproc_per_node N) -m tsdkd.cli train …; for one GPU --nproc_per_node 1 "
            "with teacher_cpu_offload, or teacher_placement=local",
        )

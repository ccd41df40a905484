"""Many processes on one: torch's fake process group, whose collectives give at once what this process gave, and models of a few
small layers in the place of a run's own. What a run of many GPUs is made of is built and stepped through; its numbers mean
nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tsdkd.trainers.sizes import empty_model

_HEAD, _WIDTH, _NARROW = 8, 64, 128  # of a small model's attention heads, of its other layers, of its states
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
_STAGES = {"zero2": 2, "zero3": 3}


def enter(processes: int) -> None:
    """Make this process the first of so many, for good: of a process of its own."""
    told = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": min(processes, 8), "RANK": 0, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    from accelerate import state
    from accelerate.utils import DistributedType
    from torch.nn.parallel import DistributedDataParallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    # accelerate would ask for a backend of GPUs under DeepSpeed.
    state.PartialState._prepare_backend = lambda *given, **named: ("gloo", DistributedType.MULTI_CPU)
    construct = DistributedDataParallel.__init__

    def constructed(self: Any, *given: Any, **named: Any) -> None:
        construct(self, *given, **named)
        self.register_comm_hook(None, _as_it_is)  # the fake group has nothing to give back

    DistributedDataParallel.__init__ = constructed  # type: ignore[method-assign]


def deepspeed_config(student: str) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a student under `zero2` or `zero3`, as accelerate makes it; None of a whole one."""
    if student not in _STAGES:
        return None
    filled = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    return {"zero_optimization": {"stage": _STAGES[student]}, "zero_allow_untested_optimizer": True, **filled}


def _as_it_is(_, bucket):  # torch looks at annotations, and would not know these
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def small(config: Any) -> Iterator[Any]:
    """Configurations of the same kind, vocabulary and numbers of heads, of two narrow layers: the narrowest first, then such as
    leave the heads, and at last the width, as they are."""
    for heads, width in ((_HEAD, None), (None, _NARROW), (None, None)):
        made = copy.deepcopy(config)
        text = made.get_text_config()
        text.num_hidden_layers = min(2, text.num_hidden_layers)
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        for name in _WIDTHS:
            if getattr(text, name, None):
                setattr(text, name, _WIDTH)
        if heads is not None:
            text.hidden_size = heads * text.num_attention_heads
            for name in ("head_dim", "query_pre_attn_scalar"):
                if getattr(text, name, None):
                    setattr(text, name, heads)
        elif width is not None:
            text.hidden_size = width
        yield made


def save_small(config: Any, name: str, folder: Path, **loading: Any) -> str:
    """A small model of a configuration in a folder, with the tokenizer of the model of that name; the folder's path.

    Raises:
        ValueError: no tokenizer is to be had, or no small model of the kind runs.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        AutoTokenizer.from_pretrained(name, **loading).save_pretrained(folder)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{name}: its tokenizer cannot be read ({why}), and prompts need it.") from error
    failure: Exception | None = None
    for made in small(config):
        torch.manual_seed(0)
        try:
            model = empty_model(made, dtype=torch.float32).eval()
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.long))
        except Exception as error:  # sizes that this kind ties to each other
            failure = error
            continue
        model.save_pretrained(folder)
        break
    else:
        raise ValueError(f"{name}: no small model of its kind runs here ({failure}), so that it cannot be tried.") from failure
    try:
        GenerationConfig.from_pretrained(name, **loading).save_pretrained(folder)
    except OSError:
        pass  # a model without one
    return str(folder)


def step(trainer: Any, tokens: int = 8) -> None:
    """A trainer's first step, on completions that nothing wrote, whose numbers nothing looks at."""
    loop, size = trainer.loop, trainer.vocab_size
    trainer.write = lambda prompt_ids, *given, **named: [[row % size] * tokens for row, _ in enumerate(prompt_ids)]
    loop.guard.watch = loop.guard.watch_tokens = lambda *given: None
    loop.guard.check = lambda step, norm, numbers=(): [0.0] * len(numbers)
    trainer.args.max_steps = 1
    trainer.train()

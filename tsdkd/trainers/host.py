"""What the collaborators ask of the trainer; met by its shape, not by inheritance, so that they run without one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from tsdkd.data.rendering import Rendering
from tsdkd.teachers.batches import Batches


class Host(Protocol):
    """The trainer as its collaborators see it."""

    args: Any
    accelerator: Any
    model: Any
    tools: Any
    max_completion_length: int
    vocab_size: int

    def cut(self, tokens: int | None) -> AbstractContextManager[None]:
        """Shorter completions for a while; None: as long as ever."""
        ...

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`."""
        ...

    @property
    def training(self) -> bool:
        """Whether `train()` runs."""
        ...

    @property
    def step(self) -> int:
        """The optimizer steps made."""
        ...

    @property
    def micro_step(self) -> int:
        """Which of a step's micro-batches is in hand, from 0."""
        ...

    @property
    def max_steps(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a completion and that both models have, the tokenizer's own first."""
        ...

    @property
    def unknown_ids(self) -> list[int]:
        """Ids that no completion may hold: rows that pad an embedding, and places of images."""
        ...

    @property
    def rendering(self) -> Rendering:
        """How rows become ids."""
        ...

    def tokenize(self, prompts: list) -> list[list[int]]:
        """Prompts, or rows with them, as they are generated from."""
        ...

    def vision(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """What models read of rows beside their ids (`Rollouts.vision`); None of texts alone."""
        ...

    def drawn(self, rows: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """The images of rows, and what TRL's generation takes beside their ids."""
        ...

    def student(self) -> AbstractContextManager[Any]:
        """The student, whole, in evaluation mode and without gradient, for a writer or a reader of our own."""
        ...

    def rollout_engine(self) -> AbstractContextManager[Any]:
        """The vLLM of this process with the student's weights of now; None where it has none. Every process must enter."""
        ...

    def gathered_heads(self, *models: Any) -> AbstractContextManager[None]:
        """Under ZeRO-3 the heads of these models whole; elsewhere nothing."""
        ...

    def any_process(self, flag: bool) -> bool:
        """Whether a flag is up on any process; every process must ask."""
        ...

    def save_now(self) -> None:
        """A checkpoint of the last whole step."""
        ...


def batch_rows(args: Any) -> int:
    """Rows of an optimizer step on one process."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def teacher_rows(args: Any) -> int:
    """Rows of a teacher's forward pass."""
    return args.teacher_batch_size or args.per_device_train_batch_size


def most_of(accelerator: Any) -> Callable[[int], int]:
    """From a number to the largest of it over all processes; every process must ask."""

    def most(number: int) -> int:
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max().item())

    return most


def teacher_batches(args: Any, accelerator: Any = None) -> Batches:
    """Which rows a teacher's forward pass reads; of a model in shares, as many passes on every process of `accelerator`."""
    agreed = None if accelerator is None else most_of(accelerator)
    return Batches(teacher_rows(args), args.teacher_batch_tokens, args.padding_free, agreed)


def eval_sets(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation sets by the role that messages name."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": rows for name, rows in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def has_completions(columns: Collection[str]) -> bool:
    """Whether given completions stand in one of these columns, as text or as ids."""
    return "completion" in columns or "completion_ids" in columns


def once_a_run(name: str) -> logging.Logger:
    """A logger that speaks on the first process alone, for what every process would say."""
    logger = logging.getLogger(name)
    logger.addFilter(lambda record: int(os.environ.get("RANK", "0")) == 0)
    return logger


def change_data(trainer: Any, change: Callable[[Any, str], Any]) -> None:
    """Put what `change(rows, role)` gives in the place of the training set and of every evaluation set."""
    if trainer.train_dataset is not None:
        trainer.train_dataset = change(trainer.train_dataset, "train_dataset")
    if isinstance(trainer.eval_dataset, dict):
        sets = trainer.eval_dataset.items()
        trainer.eval_dataset = {name: change(rows, f"eval_dataset[{name!r}]") for name, rows in sets}
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = change(trainer.eval_dataset, "eval_dataset")

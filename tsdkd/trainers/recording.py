"""Writing a recording: a run's rollouts and its teacher's hidden states, step by step, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from tsdkd.data.prompts import COLUMNS
from tsdkd.teachers.recorded import MANIFEST, write_manifest, write_shard


def check_recordable(trainer: Any, folder: Path) -> None:
    """Refuse what a `TokenDistillTrainer` cannot record, or not here.

    Raises:
        ValueError: saying what to do.
    """
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds a recording already: name another folder, or remove it.")
    lacks = trainer.train_dataset is None or trainer.teacher is None or trainer.args.recording
    if lacks or not trainer.method.reads_teacher or trainer.loop.supply.spec.replay is not None:
        raise ValueError(
            "a recording takes a train_dataset, a live teacher and completions that do not depend on the run's evaluations: "
            "record with tsd_kd or gkd."
        )
    if trainer.tools:
        raise ValueError("completions that call tools cannot be recorded: leave tools out.")


def write_recording(trainer: Any, folder: Path, about: dict[str, Any]) -> None:
    """A shard a step and process, then head and manifest by the first process."""
    trainer.model.train()
    trainer.state.max_steps = max(1, trainer.args.max_steps)
    process, shards = trainer.accelerator.process_index, []
    try:
        for number, (rows, step) in enumerate(trainer.generation_batches()):
            if number == trainer.args.max_steps:
                break
            assert step.teacher_hidden is not None
            prompts = [{key: row[key] for key in COLUMNS[:3] if row.get(key)} for row in rows]
            name = f"step-{number:05d}-{process}"
            shards.append(write_shard(folder, name, prompts, step.rollouts, list(step.teacher_hidden)))
    finally:
        trainer.state.global_step = 0  # the draws went by it
    every = gather_object(shards)
    models = () if trainer.teacher_model is None else (trainer.teacher_model,)
    with trainer.gathered_heads(*models):  # by all processes, where each holds a share
        if trainer.accelerator.is_main_process:
            assert trainer.teacher is not None
            head = trainer.teacher.head.cut(trainer.vocab_size)
            write_manifest(folder, every, head, trainer.tokenizer.get_vocab(), about)
    trainer.accelerator.wait_for_everyone()

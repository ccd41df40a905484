"""Writing a recording: a run's rollouts and its teacher's hidden states, step by step, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from tsdkd.teachers.recorded import MANIFEST, write_manifest, write_shard

if TYPE_CHECKING:
    from tsdkd.trainers.token_level import TokenDistillTrainer


def check_recordable(trainer: TokenDistillTrainer, folder: Path) -> None:
    """Refuse what cannot be recorded, or not here.

    Raises:
        ValueError: saying what to do.
    """
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds a recording already: name another folder, or remove it.")
    lacks = trainer.train_dataset is None or trainer.teacher is None or trainer.args.recording or not trainer.reads_teacher
    if lacks or trainer.answers.replay is not None:
        raise ValueError(
            "a recording takes a train_dataset, a live teacher and answers that do not depend on the run's evaluations: record "
            "with tsd_kd or gkd."
        )
    if trainer.tools:
        raise ValueError("answers that call tools cannot be recorded: leave tools out.")


def write_recording(trainer: TokenDistillTrainer, folder: Path, about: dict[str, Any]) -> None:
    """A shard a step and process, then head and manifest by the first process."""
    trainer.model.train()
    trainer.state.max_steps = max(1, trainer.args.max_steps)
    process, shards = trainer.accelerator.process_index, []
    for number, batch in enumerate(trainer.generation_batches()):
        if number == trainer.args.max_steps:
            break
        prompts = [row["prompt"] for row in trainer.rows_in_hand]
        name = f"step-{number:05d}-{process}"
        shards.append(write_shard(folder, name, prompts, trainer.rollouts_of(batch), batch["teacher_hidden"]))
    every = gather_object(shards)
    models = () if trainer.teacher_model is None else (trainer.teacher_model,)
    with trainer.gathered_heads(*models):  # by all processes, where each holds a share
        if trainer.accelerator.is_main_process:
            assert trainer.teacher is not None
            head = trainer.teacher.head.cut(trainer.vocab_size)
            write_manifest(folder, every, head, trainer._tokenizer.get_vocab(), about)
    trainer.accelerator.wait_for_everyone()

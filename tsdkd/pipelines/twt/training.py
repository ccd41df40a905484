"""Supervised fine-tuning of a stage's student by TRL's SFTTrainer, whole or by LoRA; an interrupted one goes on at an epoch."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tsdkd.checks import check_choice, check_count, check_positive
from tsdkd.data import commits
from tsdkd.pipelines.students import lora_config, save_student, tokenizer_of


@dataclass(frozen=True)
class Training:
    """How a stage's student is trained; the defaults are the paper's (4.1).

    Args:
        learning_rate: of AdamW, with TRL's schedule.
        epochs: over the stage's rows.
        batch_size: rows a step.
        accumulation: micro-batches that a step's rows come in.
        max_length: prompt and completion, tokens; longer rows are left out and counted.
        lora_r: rank of the adapters, merged after each stage; 0 trains all weights.
        lora_alpha: their scale; None: twice the rank. The paper names none.
        loss_on: `completion`, the tokens that the student will write; `joint`, the prompt's too, as the paper's Eq. 4 has it
            (`log P([x; r; y])`). Prompts are given at inference, so what is spent on them teaches nothing that is asked for.
    """

    learning_rate: float = 1e-5
    epochs: float = 4
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 4096
    lora_r: int = 8
    lora_alpha: int | None = None
    loss_on: str = "completion"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            check_positive(name, getattr(self, name))
        for name in ("batch_size", "accumulation", "max_length"):
            check_count(name, getattr(self, name))
        check_count("lora_r", self.lora_r, smallest=0)
        check_choice("loss_on", self.loss_on, ("completion", "joint"))
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of accumulation={self.accumulation}.")

    @property
    def settings(self) -> dict[str, Any]:
        """What a trained student depends on."""
        return {name: value for name, value in asdict(self).items() if name != "accumulation"}


def weighted(rows: Sequence[dict[str, str]], weight: float, seed: int) -> list[dict[str, str]]:
    """Rows as often as a task of this weight in a loss of two would count them: whole repeats, and a drawn part for the rest.

    Example:
        >>> len(weighted([{"prompt": "a", "completion": "b"}] * 10, 2.5, seed=0))
        25
    """
    whole = int(weight)
    part = random.Random(f"{seed}/weight").sample(list(rows), round((weight - whole) * len(rows)))
    return [*rows] * whole + part


def train(
    student: str,
    rows: Sequence[dict[str, str]],
    folder: Path,
    options: Training,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Train on rows of `prompt` and `completion`, and write the student into `folder`.

    Args:
        student: its name or folder.
        folder: gets its files; checkpoints stand in `folder/run` until it is whole.
        progress: is told of steps.

    Returns:
        what the stage's summary says: rows, steps, the last loss, tokens trained on.

    Raises:
        ValueError: no row fits.
    """
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tsdkd.data.files import data_set

    tokenizer = tokenizer_of(student)
    as_chat = tokenizer.chat_template is not None
    made = [rendered(row, as_chat) for row in rows]
    lengths = [_length(tokenizer, row, as_chat) for row in made]
    fits = [row for row, length in zip(made, lengths, strict=True) if length <= options.max_length]
    if not fits:
        raise ValueError(
            f"no row fits into max_length={options.max_length}: the shortest has {min(lengths, default=0)} tokens."
        )
    gpu = torch.cuda.is_available()
    devices = max(1, torch.cuda.device_count())  # one process that sees several splits each micro-batch over them
    micro, rest = divmod(options.batch_size, options.accumulation * devices)
    if rest:
        raise ValueError(
            f"batch_size={options.batch_size} does not divide into {options.accumulation} parts on {devices} GPUs."
        )
    run = folder / "run"
    config = SFTConfig(
        output_dir=str(run),
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.accumulation,
        max_length=None,
        completion_only_loss=options.loss_on == "completion",
        save_strategy="epoch",
        logging_steps=10,
        report_to="none",
        seed=seed,
        use_cpu=not gpu,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=gpu,
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        model_init_kwargs=None,
    )
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=data_set(fits, "the stage's rows"),
        processing_class=tokenizer,
        peft_config=lora_config(options.lora_r, options.lora_alpha),
    )

    class Whole(TrainerCallback):
        """A checkpoint has a manifest once it is whole."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            commits.write_manifest(run / f"checkpoint-{state.global_step}", {"step": state.global_step})
            for older in commits.checkpoints(run)[1:]:
                shutil.rmtree(older, ignore_errors=True)

    trainer.add_callback(Whole())
    trainer.remove_callback(PrinterCallback)
    checkpoint, _ = commits.newest(run)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = trainer.accelerator.unwrap_model(trainer.model)
    save_student(trained, tokenizer, folder)
    shutil.rmtree(run, ignore_errors=True)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    said = {"rows": len(fits), "too long": len(made) - len(fits), "steps": trainer.state.global_step}
    del trainer, trained, model
    gc.collect()
    return {**said, "loss": round(losses[-1] if losses else result.training_loss, 4)}


def rendered(row: dict[str, str], as_chat: bool) -> dict[str, Any]:
    """A row as TRL takes it: chat messages where the student has a template, else texts, the completion on its own line."""
    if not as_chat:
        return {"prompt": f"{row['prompt']}\n", "completion": row["completion"]}
    turns = (("prompt", "user"), ("completion", "assistant"))
    return {name: [{"role": role, "content": row[name]}] for name, role in turns}


def _length(tokenizer: Any, row: dict[str, Any], as_chat: bool) -> int:
    if as_chat:
        found = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=True)
        return len(found["input_ids"] if hasattr(found, "keys") else found)
    return len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1

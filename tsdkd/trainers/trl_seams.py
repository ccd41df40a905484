"""The one subclass of TRL's trainer. Private names of TRL and transformers stand here, in `engines.py`, `processors.py`
and `loading.py`, and nowhere else; `tests/trainers/test_trl_seam.py` compares the signatures relied on, so that an upgrade of
TRL fails in one clear line.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from trl import DistillationTrainer

from tsdkd.data.prompts import COLUMNS
from tsdkd.rollouts import as_asked
from tsdkd.teachers import gathered
from tsdkd.trainers.engines import EpochSampler, Generation, InHand, asked_of_optimizer, without_repeats
from tsdkd.trainers.ignored import without
from tsdkd.trainers.loading import load_renamed
from tsdkd.trainers.loop import Loop
from tsdkd.trainers.processors import drawn_of, eos_ids_of, rendering_of, seen_by, unknown_ids_of
from tsdkd.trainers.random_state import random_state_kept
from tsdkd.trainers.saving import Saving
from tsdkd.trainers.step import Step
from tsdkd.trainers.vision import prepared, refuse_images_of_tools
from tsdkd.types import Rollouts


class TRLTrainer(DistillationTrainer):
    """TRL's generation, tools, PEFT, accumulation and logging, handing its few moments to `self.loop`; it is the `Host`."""

    loop: Loop
    generation: Generation
    saving: Saving
    epoch_in_hand = 0
    stopped_by: int | None = None  # the signal that ended the last run
    vocab_size: int
    train_dataset: Any
    eval_dataset: Any
    _in_hand: InHand
    _buffered_inputs: Any
    _signature_columns: list[str]
    rendering = functools.cached_property(rendering_of)
    vision, drawn = seen_by, drawn_of
    eos_ids, unknown_ids = property(eos_ids_of), property(unknown_ids_of)

    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def training(self) -> bool:
        return self.is_in_train

    @property
    def step(self) -> int:
        return self.state.global_step

    @property
    def micro_step(self) -> int:
        return self._step % self.args.gradient_accumulation_steps

    @property
    def max_steps(self) -> int:
        return self.state.max_steps

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def tokenize(self, prompts: list) -> list[list[int]]:
        return self.rendering.prompts(prompts)

    def student(self) -> AbstractContextManager[Any]:
        return self.generation.student()

    def rollout_engine(self) -> AbstractContextManager[Any]:
        return self.generation.engine()

    def cut(self, tokens: int | None) -> AbstractContextManager[None]:
        return self.generation.cut(tokens)

    def gathered_heads(self, *models: Any) -> AbstractContextManager[None]:
        heads = [model.get_output_embeddings() for model in models]
        return gathered(*(p for head in heads for p in (head.weight, getattr(head, "bias", None))))

    def any_process(self, flag: bool) -> bool:
        up = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(up, reduction="sum").item())

    def load_weights(self, checkpoint: str) -> None:
        if not load_renamed(self, checkpoint):
            self._load_from_checkpoint(checkpoint)

    def _load_best_model(self):
        if not load_renamed(self, self.state.best_model_checkpoint):
            super()._load_best_model()

    def save_now(self) -> None:
        self._save_checkpoint(self.model, trial=None)

    # ------------------------------------------------------------------ generation

    def write(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """The student's own completions, by transformers or vLLM."""
        with as_asked(self.accelerator.unwrap_model(self.model)), self.generation.seeded(self.mode, self.step):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        by_student = lambda ids: self.write(ids, *args, **kwargs)  # noqa: E731
        if self._in_hand.empty is not None:  # a later turn: for a part of the rows, not on every process
            return by_student(prompt_ids)
        written = self.loop.write(self._in_hand.batch, prompt_ids, by_student)
        self._in_hand.token_values = written.token_values
        self._in_hand.empty = {row for row, ids in enumerate(written.ids) if not ids}
        # TRL reads ids[-1] of every completion; a padding token stands in and is not trained on.
        return [ids or [self._tokenizer.pad_token_id] for ids in written.ids]

    def _tokenize_prompts(self, prompts: list):
        if self._is_vlm and not isinstance(prompts[0], str):
            return super()._tokenize_prompts(prompts)
        return self.tokenize(self._in_hand.batch.rows), None, {}

    def _generate(self, prompts: list):
        hand = self._in_hand
        with self.loop.metrics.time(self.mode, "rollout"):
            prompt_ids, completion_ids, tool_mask, _, tool_images = super()._generate(prompts)
        refuse_images_of_tools(tool_images)
        self.loop.prompts.refuse_unfit(prompt_ids)
        masks = tool_mask if tool_mask is not None else [[1] * len(ids) for ids in completion_ids]
        if hand.empty:
            masks = [[0] * len(mask) if row in hand.empty else mask for row, mask in enumerate(masks)]
        masks = without(self.loop.ignored, completion_ids, masks)
        if hand.empty or self.loop.ignored:
            tool_mask = masks
        values = hand.token_values.items()
        recorded = {name: [row or [0.0] for row in column] for name, column in values}  # of a placeholder too
        theirs = self.loop.teacher_prompts.both(hand.batch.rows)
        hand.rollouts = Rollouts(prompt_ids, completion_ids, masks, recorded, *theirs, self.vision(hand.batch.rows))
        return prompt_ids, completion_ids, tool_mask, None, tool_images  # each row has its images in `vision`

    def _generate_and_score_completions(self, inputs):
        self._in_hand = InHand(self.loop.rows(inputs))
        rows = self._in_hand.batch.rows
        output = super()._generate_and_score_completions([prepared(row) for row in rows] if self._is_vlm else rows)
        rollouts = self._in_hand.rollouts
        assert rollouts is not None
        if self.mode == "eval":
            rollouts = without_repeats(rollouts, self.accelerator)
        output.update(self.loop.prepare(rollouts).to_trl())
        return output

    def _prepare_inputs(self, generation_batch):
        fresh = self.mode == "train" and (self._buffered_inputs is None or self.micro_step == 0)
        inputs = super()._prepare_inputs(generation_batch)
        if not fresh or len(self._buffered_inputs) == 1:
            return inputs
        self._buffered_inputs = Step.by_length(self._buffered_inputs)
        return self._buffered_inputs[self.micro_step]

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *COLUMNS[1:]]

    # ------------------------------------------------------------------ training

    def get_batch_samples(self, *given: Any) -> tuple[list, Any]:
        draw, ahead = super().get_batch_samples, self.loop.ahead
        return draw(*given) if ahead is None else ahead.batches(draw, *given)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.loop.metrics.time("train", "step"):  # after an evaluation the model is not yet in training mode here
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model)
        loss = self._forward_redirection(model, student, self.loop.compute, student, Step.of(inputs))
        last = (self._step + 1) % self.args.gradient_accumulation_steps == 0
        if self.is_deepspeed_enabled and self.mode == "train" and last:
            self.loop.before_optimizer_step(None)  # DeepSpeed changes the weights inside backward
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        check = self.loop.check_gradient_norm if self.is_deepspeed_enabled else self.loop.before_optimizer_step
        check(grad_norm)
        return grad_norm

    # ------------------------------------------------------------------ logs, evaluations, checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.mode == "train":
            logs.update(self.loop.window("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Sums over the whole evaluation set divided by its counts, not transformers' mean of batch means."""
        self.loop.window("eval")  # forget what an interrupted evaluation left
        with random_state_kept():  # an evaluation leaves the training's draws as they were
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.loop.window("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.loop.after_evaluation(metrics, metric_key_prefix)
        return output

    def _save_checkpoint(self, model, trial):
        with self.saving.checkpoint(self.step) as folder:
            super()._save_checkpoint(model, trial)
            self.loop.checkpoints.save(folder)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(Path(self.args.output_dir) / folder.name))

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return folder if self.saving.temporary is None else str(self.saving.temporary)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Left to the end of the save."""

    def _get_train_sampler(self, dataset=None):
        return EpochSampler.like(super()._get_train_sampler(dataset), lambda: self.epoch_in_hand)

    def _run_epoch(self, model, epoch, *args: Any, **kwargs: Any):
        self.epoch_in_hand = epoch
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.loop.begin(max_steps)  # before a checkpoint's state is loaded
        load_renamed(self, resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with asked_of_optimizer(self.optimizer, self.lr_scheduler, self.args, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.loop.checkpoints.load(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        kept = self.args.output_dir
        with self.saving.student(output_dir or kept) as folder:
            super().save_model(folder, _internal_call=True)
            self.args.output_dir = folder  # where TRL writes the card
            self.create_model_card(model_name=Path(output_dir or kept).name)
            self.args.output_dir = kept
        if self.args.push_to_hub:  # once it is whole
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

"""The one subclass of TRL's trainer. Private names of TRL and transformers stand here, in `engines.py` and in `loading.py`, and
nowhere else; `tests/trainers/test_trl_seam.py` compares the signatures relied on, so that an upgrade of TRL fails in one
clear line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import DistillationTrainer

from tsdkd.data.prompts import COLUMNS
from tsdkd.data.rendering import Rendering
from tsdkd.rollouts import as_asked
from tsdkd.teachers import gathered
from tsdkd.trainers.completions import Batch
from tsdkd.trainers.engines import Generation, without_repeats
from tsdkd.trainers.loop import Loop
from tsdkd.trainers.step import Step
from tsdkd.types import Rollouts


@dataclass
class _InHand:
    """What of a generation batch is there while TRL generates it."""

    batch: Batch
    empty: set[int] | None = None  # rows without a token; None while the first turn is still to come
    token_values: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    rollouts: Rollouts | None = None


class TRLTrainer(DistillationTrainer):
    """TRL's generation, tools, PEFT, accumulation and logging, handing its few moments to `self.loop`; it is the `Host`."""

    loop: Loop
    generation: Generation
    vocab_size: int
    train_dataset: Any
    eval_dataset: Any
    _in_hand: _InHand
    _buffered_inputs: Any
    _signature_columns: list[str]

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

    @property
    def eos_ids(self) -> list[int]:
        own = self._tokenizer.eos_token_id  # a list may begin with an end that the model never writes
        return sorted((end for end in self.eos_token_ids if end < self.vocab_size), key=lambda end: end != own)

    @property
    def unknown_ids(self) -> list[int]:
        known = set(self._tokenizer.get_vocab().values())
        return [i for i in range(self.vocab_size) if i not in known]

    @functools.cached_property
    def rendering(self) -> Rendering:
        alone = super()._tokenize_prompts  # a processor wants content in parts, and gives more than ids
        return Rendering(
            self.processing_class,
            self._tokenizer,
            lambda: self.eos_ids,
            tools=self.tools,
            chat_template=self.chat_template,
            options=self.chat_template_kwargs,
            multimodal=(lambda chats: alone(chats)[0]) if self._is_vlm else None,
        )

    def tokenize(self, prompts: list) -> list[list[int]]:
        return self.rendering.prompts(prompts)

    def student(self) -> AbstractContextManager[Any]:
        return self.generation.student()

    def rollout_engine(self) -> AbstractContextManager[Any]:
        return self.generation.engine()

    def gathered_heads(self, *models: Any) -> AbstractContextManager[None]:
        heads = [model.get_output_embeddings() for model in models]
        return gathered(*(p for head in heads for p in (head.weight, getattr(head, "bias", None))))

    def any_process(self, flag: bool) -> bool:
        up = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(up, reduction="sum").item())

    def save_now(self) -> None:
        self._save_checkpoint(self.model, trial=None)

    # ------------------------------------------------------------------ generation

    def write(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """The student's own completions, by transformers or vLLM."""
        with as_asked(self.accelerator.unwrap_model(self.model)):
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
            prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        self.loop.prompts.refuse_unfit(prompt_ids)
        masks = tool_mask if tool_mask is not None else [[1] * len(ids) for ids in completion_ids]
        if hand.empty:
            masks = [[0] * len(mask) if row in hand.empty else mask for row, mask in enumerate(masks)]
            tool_mask = masks
        values = hand.token_values.items()
        recorded = {name: [row or [0.0] for row in column] for name, column in values}  # of a placeholder too
        hand.rollouts = Rollouts(prompt_ids, completion_ids, masks, recorded)
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    def _generate_and_score_completions(self, inputs):
        self._in_hand = _InHand(self.loop.rows(inputs))
        output = super()._generate_and_score_completions(self._in_hand.batch.rows)
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
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.loop.window("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.loop.after_evaluation(metrics, metric_key_prefix)
        return output

    def change_data(self, change: Callable[[Any, str], Any]) -> None:
        """Put what `change(rows, role)` gives in the place of the training set and of every evaluation set."""
        if self.train_dataset is not None:
            self.train_dataset = change(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: change(rows, f"eval_dataset[{name!r}]") for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = change(self.eval_dataset, "eval_dataset")

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.loop.checkpoints.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.loop.begin(max_steps)  # before a checkpoint's state is loaded
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.loop.checkpoints.load(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            kept = self.args.output_dir
            self.args.output_dir = output_dir or kept  # where TRL writes the card
            self.create_model_card(model_name=Path(self.args.output_dir).name)
            self.args.output_dir = kept

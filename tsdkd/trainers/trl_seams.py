"""The one subclass of TRL's trainer. Every private attribute of TRL and transformers is named here, and nowhere else.

It offers hooks to `token_level.py`; `tests/test_trl_seam.py` compares the signatures it relies on, so that an upgrade of
TRL fails in one clear line.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import deepspeed as integration
from trl import DistillationTrainer
from trl.import_utils import is_vllm_available
from trl.models import unwrap_model_for_generation

from tsdkd.data.completions import answer_ids, answer_text
from tsdkd.teachers.zero3 import gathered
from tsdkd.types import Rollouts


@contextmanager
def loading_under(config: dict[str, Any] | None) -> Iterator[None]:
    """transformers' loading under this DeepSpeed configuration, or under none: it would shard a teacher as the student's asks.

    The configuration that is read while a model is loaded is one global, and the student's is put back.
    """
    before = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    kept = None if config is None else integration.HfDeepSpeedConfig(config)  # it counts as long as it lives
    try:
        yield
    finally:
        del kept
        integration.unset_hf_deepspeed_config()
        if before is not None:
            integration.set_hf_deepspeed_config(before)


class SeamTrainer(DistillationTrainer, abc.ABC):
    """TRL's generation, tools, PEFT, accumulation and logging, with the loss and its counts handed to hooks.

    Hooks:
        choose_rows(rows): the data set's rows of a generation batch, or others in their place.
        write(prompt_ids, …): the completions' ids, one list a prompt.
        recorded(): what the writer wrote down of each completion token since the last call, by name.
        prepare_step(rollouts): what joins the generation batch beside TRL's tensors, from this process's rollouts.
        after_writing(failure): called on every process; `failure` is sampling's error for logits that are not finite.
        token_loss(student, inputs): the micro-batch's loss, run inside the student's wrapper.
        before_optimizer_step(grad_norm): called once per optimizer step, before the weights change; under DeepSpeed, whose
            backward changes them, before the last backward and without a norm.
        check_gradient_norm(grad_norm): called under DeepSpeed, once the norm is known.
        window_metrics(mode): extra metrics at logging time.
        after_evaluation(metrics, prefix): called with an evaluation's metrics and their prefix, which names its data set.
        checkpoint_state(), restore_state(state): what a checkpoint keeps of this process, as JSON; None is nothing.
    """

    @abc.abstractmethod
    def choose_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]: ...

    @abc.abstractmethod
    def recorded(self) -> dict[str, list[list[float]]]: ...

    @abc.abstractmethod
    def after_evaluation(self, metrics: dict[str, float], prefix: str) -> None: ...

    @abc.abstractmethod
    def checkpoint_state(self) -> dict[str, Any] | None: ...

    @abc.abstractmethod
    def restore_state(self, state: dict[str, Any]) -> None: ...

    @abc.abstractmethod
    def prepare_step(self, rollouts: Rollouts) -> dict[str, Any]: ...

    @abc.abstractmethod
    def after_writing(self, failure: RuntimeError | None) -> None: ...

    @abc.abstractmethod
    def token_loss(self, student: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor: ...

    @abc.abstractmethod
    def before_optimizer_step(self, grad_norm: torch.Tensor | float | None) -> None: ...

    @abc.abstractmethod
    def window_metrics(self, mode: str) -> dict[str, float]: ...

    @abc.abstractmethod
    def check_gradient_norm(self, grad_norm: torch.Tensor | float | None) -> None: ...

    def on_any_process(self, condition: bool) -> bool:
        """Whether a condition holds on any process; every process must ask."""
        flag = torch.tensor(float(condition), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def change_eval_sets(self, change: Callable[[Any, str], Any]) -> None:
        """Put what `change(rows, role)` gives in the place of every evaluation set."""
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: change(rows, f"eval_dataset[{name!r}]") for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = change(self.eval_dataset, "eval_dataset")

    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    def tokenize(self, prompts: list) -> list[list[int]]:
        """Prompts as TRL will tokenize them for generation."""
        return self._tokenize_prompts(prompts)[0]

    def tokenize_answers(self, prompts: list, completions: list, limit: int) -> list[tuple[list[int], bool]]:
        """The ids of given answers after their prompts, as `data.completions.answer_ids` gives them."""
        texts = [answer_text(completion) for completion in completions]
        alone = self.processing_class(text=texts, add_special_tokens=False)["input_ids"]
        if isinstance(prompts[0], str):
            whole = self.processing_class(text=[a + b for a, b in zip(prompts, texts, strict=True)])["input_ids"]
        else:
            turns = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, texts, strict=True)]
            whole = self.processing_class.apply_chat_template(
                conversation=turns,
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )["input_ids"]
        parts = zip(self.tokenize(prompts), whole, alone, strict=True)
        return [answer_ids(p, w, a, self.eos_token_ids, limit) for p, w, a in parts]

    def generation_batches(self) -> Iterator[dict[str, Any]]:
        """A run's generation batches with their rollouts and what `prepare_step` adds, one a step, of one epoch."""
        try:
            for number, rows in enumerate(self.get_train_dataloader()):
                if number % self.args.gradient_accumulation_steps == 0:
                    self.state.global_step = number // self.args.gradient_accumulation_steps  # draws depend on it
                    yield self._generate_and_score_completions(rows)
        finally:
            self.state.global_step = 0

    @contextmanager
    def model_for_writing(self) -> Iterator[Any]:
        """The student, whole and in evaluation mode, for a writer of our own."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as student,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            was_training = student.training
            student.eval()
            try:
                yield student
            finally:
                student.train(was_training)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "completion", "completion_ids", "recorded"]

    def forbid_ids_from(self, vocab_size: int) -> None:
        """Never sample an id from `vocab_size` on: the other model has no embedding for it."""
        beyond = list(range(vocab_size, self.model.config.get_text_config().vocab_size))
        if not beyond:
            return
        if self.use_vllm:
            kwargs = dict(self.vllm_generation.generation_kwargs or {})
            kwargs["allowed_token_ids"] = [i for i in kwargs.get("allowed_token_ids", range(vocab_size)) if i < vocab_size]
            self.vllm_generation.generation_kwargs = kwargs
            return
        suppressed = sorted({*(self.generation_kwargs.get("suppress_tokens") or []), *beyond})
        self.generation_kwargs["suppress_tokens"] = suppressed
        self.generation_config.suppress_tokens = suppressed

    @staticmethod
    def vllm_problem() -> str | None:
        """Why TRL cannot use the vLLM of this environment, or None."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if not is_vllm_available():
                return "vLLM is not installed"
        return next((str(w.message).split(". We")[0] for w in told if "supports vLLM versions" in str(w.message)), None)

    def reload_vllm_whole(self) -> None:
        """On a CPU vLLM repacks its layers once they are loaded, and TRL's load of one parameter after another fails: there
        the weights go through vLLM's own reload. Elsewhere TRL's way stays."""
        if not self.use_vllm or self.vllm_generation.mode != "colocate" or self.accelerator.device.type != "cpu":
            return
        generation = self.vllm_generation

        def sync_weights() -> None:
            # Copies, since vLLM may take them after a merged adapter has been taken out again.
            weights = ((name, parameter.detach().clone()) for name, parameter in generation._iter_named_params())
            generation.llm.llm_engine.model_executor.driver_worker.model_runner.reload_weights(weights_iterator=weights)
            generation.llm.reset_prefix_cache()

        generation.sync_weights = sync_weights

    @property
    def has_rollout_engine(self) -> bool:
        """Whether each process has a vLLM of its own."""
        return self.use_vllm and self.vllm_generation.mode == "colocate" and self.args.vllm_tensor_parallel_size == 1

    @contextmanager
    def rollout_engine(self) -> Iterator[Any]:
        """The vLLM of this process with the student's weights of now; None where it has none. Every process must enter."""
        if not self.has_rollout_engine:
            yield None
            return
        generation = self.vllm_generation
        generation.sync_weights()
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["kv_cache"])
        try:
            yield generation.llm
        finally:
            if generation.enable_sleep_mode:
                generation.llm.sleep(level=2)
                generation._llm_weights_sleeping = True

    def set_max_completion_length(self, tokens: int) -> None:
        """The longest completion, for TRL's own generation and for vLLM's."""
        self.max_completion_length = tokens
        self.generation_kwargs["max_new_tokens"] = tokens
        self.generation_config.max_new_tokens = tokens
        if self.use_vllm:
            self.vllm_generation.max_completion_length = tokens

    # None while the first turn of a generation is still to come.
    _empty_rows: set[int] | None
    _buffered_inputs: Any
    _signature_columns: list[str]
    train_dataset: Any
    eval_dataset: Any

    def write(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """Who writes the answers: the student, by transformers or vLLM."""
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self._empty_rows is None  # later turns write for a part of the rows, not on every process
        failure = None
        try:
            completion_ids = self.write(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if not first or "probability tensor contains" not in str(error):
                raise
            failure, completion_ids = error, [[] for _ in prompt_ids]
        if first:
            self.after_writing(failure)
            self._empty_rows = {row for row, ids in enumerate(completion_ids) if not ids}
            # TRL reads ids[-1] of every completion; a padding token stands in and is not trained on.
            completion_ids = [ids or [self._tokenizer.pad_token_id] for ids in completion_ids]
        return completion_ids

    def _generate(self, prompts: list):
        self._empty_rows = None
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        masks = tool_mask if tool_mask is not None else [[1] * len(ids) for ids in completion_ids]
        if self._empty_rows:
            masks = [[0] * len(mask) if row in self._empty_rows else mask for row, mask in enumerate(masks)]
            tool_mask = masks
        recorded = {
            name: [values or [0.0] for values in column]  # of a placeholder too
            for name, column in self.recorded().items()
        }
        self._rollouts = Rollouts(prompt_ids, completion_ids, masks, recorded)
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(self.choose_rows(inputs))
        rollouts = self._rollouts
        if self.mode == "eval":
            rollouts = self._without_repeats(rollouts)
        # Lists are shuffled and split with the batch, 0-d tensors are passed through.
        output["rollout_prompts"] = rollouts.prompt_ids
        output["rollout_completions"] = rollouts.completion_ids
        output["rollout_masks"] = rollouts.completion_mask
        output.update({f"recorded_{name}": column for name, column in rollouts.recorded.items()})
        output.update(self.prepare_step(rollouts))
        return output

    def _without_repeats(self, rollouts: Rollouts) -> Rollouts:
        """Untrain the rows that accelerate repeats to fill the last evaluation batch of all processes."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rollouts
        first = self.accelerator.process_index * len(rollouts)
        masks = [m if first + row < state.remainder else [0] * len(m) for row, m in enumerate(rollouts.completion_mask)]
        return dataclasses.replace(rollouts, completion_mask=masks)

    def _prepare_inputs(self, generation_batch):
        fresh = self.mode == "train" and (
            self._buffered_inputs is None or self._step % self.args.gradient_accumulation_steps == 0
        )
        inputs = super()._prepare_inputs(generation_batch)
        if not fresh or len(self._buffered_inputs) == 1:
            return inputs
        self._buffered_inputs = self._by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]

    @staticmethod
    def _by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches again, of rows of like length, the longest first (a lack of memory shows at once).

        The loss does not depend on the split, so this only saves the padding that unlike rows would cost each other.
        """
        per_row = [key for key, value in batches[0].items() if isinstance(value, list)]
        rows = [{key: batch[key][i] for key in per_row} for batch in batches for i in range(len(batch[per_row[0]]))]
        rows.sort(key=lambda row: -len(row["rollout_prompts"]) - len(row["rollout_completions"]))
        size = len(rows) // len(batches)
        shared = {key: value for key, value in batches[0].items() if isinstance(value, torch.Tensor) and value.ndim == 0}
        split = [rows[i * size : (i + 1) * size] for i in range(len(batches))]
        return [{**shared, **{key: [row[key] for row in part] for key in per_row}} for part in split]

    def gathered_heads(self, *models: Any) -> AbstractContextManager:
        """Under ZeRO-3 the heads of these models whole, once for a micro-batch; elsewhere nothing."""
        heads = [model.get_output_embeddings() for model in models]
        return gathered(*(p for head in heads for p in (head.weight, getattr(head, "bias", None))))

    @staticmethod
    def rollouts_of(inputs: dict[str, Any]) -> Rollouts:
        """A micro-batch's rollouts."""
        recorded = {key.removeprefix("recorded_"): value for key, value in inputs.items() if key.startswith("recorded_")}
        return Rollouts(inputs["rollout_prompts"], inputs["rollout_completions"], inputs["rollout_masks"], recorded)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model)
        loss = self._forward_redirection(model, student, self.token_loss, student, inputs)
        last = (self._step + 1) % self.args.gradient_accumulation_steps == 0
        if self.is_deepspeed_enabled and self.mode == "train" and last:
            self.before_optimizer_step(None)  # DeepSpeed changes the weights inside backward
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        (self.check_gradient_norm if self.is_deepspeed_enabled else self.before_optimizer_step)(grad_norm)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.mode == "train":
            logs.update(self.window_metrics("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Sums over the whole evaluation set divided by its counts, not transformers' mean of batch means."""
        self.window_metrics("eval")  # forget what an interrupted evaluation left
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.window_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.after_evaluation(metrics, metric_key_prefix)
        return output

    def save_checkpoint_now(self) -> None:
        """A checkpoint of the last whole step."""
        self._save_checkpoint(self.model, trial=None)

    def _state_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"tsdkd_state_{self.accelerator.process_index}.json"

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        state = self.checkpoint_state()
        if state is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self._state_file(folder).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = self._state_file(checkpoint)
        if file.is_file():
            self.restore_state(json.loads(file.read_text()))
        elif self.checkpoint_state() is not None:
            raise ValueError(
                f"the checkpoint {checkpoint} has no {file.name}, which holds the method's state: it was written by another "
                "method or with fewer processes. Resume with the method and the number of processes that wrote it."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            kept = self.args.output_dir
            self.args.output_dir = output_dir or kept  # where TRL writes the card
            self.create_model_card(model_name=Path(self.args.output_dir).name)
            self.args.output_dir = kept

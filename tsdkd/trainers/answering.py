"""Who answers in a step: the student, the data set, the teacher ahead of the run, both models together, or a replay buffer."""

from __future__ import annotations

import abc
import logging
from pathlib import Path
from typing import Any

import torch

from tsdkd.data.completions import has_text
from tsdkd.rollouts import AnswerSource, InterleavedWriter, VLLMWriter, mixed, speculative, write_once
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.trl_seams import SeamTrainer
from tsdkd.types import Answers

logger = logging.getLogger(__name__)


class AnsweringTrainer(SeamTrainer):
    """`SeamTrainer` with answers from wherever the method takes them.

    A subclass sets `answers` before `super().__init__` and calls `prepare_answers` once both models are there.
    """

    answers: Answers
    args: TokenDistillConfig
    teacher_model: Any
    teacher_name: str
    vocab_size: int

    # Completions that stand ready for the batch in hand, in place of written ones.
    _given: list[list[int]] | None = None
    _fresh: list[dict[str, Any]] | None = None
    _recorded: dict[str, list[list[float]]]
    rows_in_hand: list[dict[str, Any]]
    _writer: InterleavedWriter | None = None

    def check_answers(self, train_dataset: Any, eval_dataset: Any, has_tools: bool, has_teacher: bool) -> None:
        """Refuse, before any model is loaded, what the method cannot get its answers from."""
        if not self.answers.need_dataset:
            return
        if has_tools:
            raise ValueError(
                "tools were given to a method that trains on the data set's answers: those call no tools. Use a method that "
                "trains on the student's own answers, or leave tools out."
            )
        sets = {"train_dataset": train_dataset}
        if self.answers.evaluate_on == "dataset":
            many = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
            sets.update({f"eval_dataset[{name!r}]" if name else "eval_dataset": rows for name, rows in many.items()})
        for role, rows in sets.items():
            columns = getattr(rows, "column_names", None) or []
            if not columns or {"completion", "completion_ids"} & set(columns):
                continue
            if self.answers.teacher_may_write and has_teacher:
                continue
            if self.answers.teacher_may_write:
                raise ValueError(
                    f"{role} has no 'completion' column and there is no teacher in this process to write one; it has: "
                    f"{', '.join(columns)}. Pass teacher_model, with teacher_placement=local or "
                    f"teacher_answers_engine=vllm, or rename the column that holds the answers to 'completion'."
                )
            raise ValueError(
                f"the method trains on the data set's answers, but {role} has no 'completion' column; it has: "
                f"{', '.join(columns)}. Rename the one that holds the answers to 'completion', or use a method that "
                "trains on the student's own answers."
            )

    def prepare_answers(self) -> None:
        """Build what the method's answers need; the teacher's own writing waits for `train()`."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.source = AnswerSource(self.answers, self.args.seed, rows, self.accelerator.num_processes)
        self._recorded = {}
        options = dict(self.answers.options)
        if self.answers.writer == "student":
            return
        self._refuse_interleaving()
        if self.answers.writer == "mixed":
            rule = mixed(options["alpha"], self.args.temperature, options["temperature"])
        else:
            rule = speculative(options["top_k"], self.args.temperature)
        self._writer = self._writer_with(self.teacher_model, rule)

    def _writer_with(self, teacher: Any, rule: Any) -> InterleavedWriter:
        return InterleavedWriter(
            teacher,
            rule,
            vocab_size=self.vocab_size,
            max_new_tokens=self.max_completion_length,
            ends=self.eos_token_ids,
            pad_id=self._tokenizer.pad_token_id,
            autocast=self.accelerator.autocast,
        )

    def _refuse_interleaving(self) -> None:
        why = None
        if self.teacher_model is None:
            why = "no teacher is in memory"
        elif self.use_vllm:
            why = "use_vllm=True gives generation to vLLM, which holds one model: leave use_vllm out"
        elif self.tools:
            why = "tools need answers of one model: leave tools out"
        elif any(hasattr(p, "ds_status") for p in self.teacher_model.parameters()):
            why = "a teacher under ZeRO-3 cannot write token by token while processes end at different lengths: keep it whole"
        elif self.args.temperature <= 0:
            why = f"temperature={self.args.temperature} leaves no distribution to draw from: pass one above 0"
        elif self.args.top_p != 1.0 or self.args.top_k or self.args.min_p:
            why = "top_p, top_k and min_p would change the distributions that are mixed: leave them at their defaults"
        elif self.args.repetition_penalty != 1.0 or self.args.generation_kwargs:
            why = "repetition_penalty and generation_kwargs are options of one model's generation: leave them out"
        if why:
            raise ValueError(f"the method's answers are written by both models, token by token, but {why}.")

    # ------------------------------------------------------------------ ahead of the run

    def let_teacher_write(self) -> None:
        """The teacher's answers to a data set that has none; those written before are read."""
        if not (self.answers.need_dataset and self.answers.teacher_may_write):
            return
        if self.train_dataset is not None:
            self.train_dataset = self._written(self.train_dataset, "train_dataset")
        self.change_eval_sets(self._written)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' `Trainer.evaluate`."""
        self.let_teacher_write()
        return super().evaluate(*args, **kwargs)

    def _written(self, dataset: Any, role: str) -> Any:
        if {"completion", "completion_ids"} & set(dataset.column_names or []):
            return dataset
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{role} is a stream without a 'completion' column: the teacher can only answer a data set of rows."
            )
        prompts = [
            ids for start in range(0, len(dataset), 1000) for ids in self.tokenize(dataset[start : start + 1000]["prompt"])
        ]
        path = Path(self.args.teacher_answers or Path(self.args.output_dir) / "teacher_answers.jsonl")
        settings = {
            "teacher": self.teacher_name,
            "max_completion_length": self.max_completion_length,
            "temperature": self.args.teacher_answers_temperature,
            "seed": self.args.seed if self.args.teacher_answers_temperature else None,
        }
        logger.info("the teacher's answers to %s are in %s", role, path.parent)
        shared: dict[str, Any] = {
            "settings": settings,
            "batch_size": self.args.teacher_batch_size or self.args.per_device_train_batch_size,
            "process": self.accelerator.process_index,
            "processes": self.accelerator.num_processes,
            "barrier": self.accelerator.wait_for_everyone,
        }
        if self.args.teacher_answers_engine == "transformers":
            answers = write_once(path, prompts, self._teacher_writes, **shared)
        else:
            answers = self._written_by_vllm(path, prompts, settings)
        return dataset.add_column("completion_ids", answers)

    def _written_by_vllm(self, path: Path, prompts: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        """One engine, on the first process, writes everything in one batch a thousand; the others read it."""
        alone: dict[str, Any] = {"settings": settings, "batch_size": 1000}
        if self.accelerator.is_main_process:
            writers: list[VLLMWriter] = []

            def write(prompt_ids: list[list[int]]) -> list[list[int]]:
                if not writers:  # no engine where all is written already
                    writers.append(
                        VLLMWriter(
                            settings["teacher"],
                            temperature=self.args.teacher_answers_temperature,
                            max_new_tokens=self.max_completion_length,
                            ends=self.eos_token_ids,
                            vocab_size=self.vocab_size,
                            gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
                            max_model_len=max(map(len, prompts)) + self.max_completion_length,
                            trust_remote_code=self.args.trust_remote_code,
                            seed=self.args.seed,
                        )
                    )
                return writers[0](prompt_ids)

            write_once(path, prompts, write, **alone)
            for writer in writers:
                writer.close()
        self.accelerator.wait_for_everyone()
        return write_once(path, prompts, _refuse_to_write, **alone)

    @torch.no_grad()
    def _teacher_writes(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Greedy, or sampled where a temperature is set."""
        temperature = self.args.teacher_answers_temperature
        rule = _greedy if temperature == 0 else mixed(1.0, temperature)
        writer = self._writer_with(None, rule)
        return writer.write(self.teacher_model, prompt_ids)[0]

    def check_given(self, dataset: Any, role: str) -> None:
        """Refuse the data set's answers where they cannot be trained on; say how many are cut."""
        columns = set(dataset.column_names or [])
        if not self.answers.need_dataset or not columns & {"completion", "completion_ids"}:
            return
        if "completion_ids" not in columns:
            empty = [row for row, completion in enumerate(dataset["completion"]) if not has_text(completion)]
            if empty:
                raise ValueError(
                    f"{role} has {len(empty)} completions without text, the first in row {empty[0]}: an answer is a "
                    "text or a list of one assistant message with a text. Remove or mend those rows."
                )
        cut = 0
        for start in range(0, len(dataset), 1000):
            rows = dataset[start : start + 1000]
            if "completion_ids" in columns:
                given = [(list(ids), len(ids) > self.max_completion_length) for ids in rows["completion_ids"]]
            else:
                given = self.tokenize_answers(rows["prompt"], rows["completion"], self.max_completion_length)
            for row, (ids, was_cut) in enumerate(given, start):
                cut += was_cut
                if max(ids, default=0) >= self.vocab_size:
                    raise ValueError(
                        f"the completion of row {row} of {role} holds id {max(ids)}, {self._tokenizer.decode([max(ids)])!r}, "
                        f"beyond the {self.vocab_size} ids that both models have. Remove that token."
                    )
        if cut:
            logger.warning(
                "%d of %d completions of %s are longer than max_completion_length=%d and lose their end.",
                cut,
                len(dataset),
                role,
                self.max_completion_length,
            )

    # ------------------------------------------------------------------ in a step

    def given_answers(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The ids of the data set's answers, cut to `max_completion_length`."""
        if "completion_ids" in rows[0]:
            return [list(row["completion_ids"])[: self.max_completion_length] for row in rows]
        prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        return [ids for ids, _ in self.tokenize_answers(prompts, completions, self.max_completion_length)]

    def choose_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.rows_in_hand = self._chosen(rows)
        return self.rows_in_hand

    def _chosen(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answered = "completion" in rows[0] or "completion_ids" in rows[0]
        if self.mode == "eval":
            self._given = self.given_answers(rows) if answered and self.answers.evaluate_on == "dataset" else None
            return rows
        step = self.state.global_step
        drawn = self.source.draw(step, self.state.max_steps)
        self._fresh, self._given = None, None
        if drawn == "fresh":
            self._fresh = rows
        elif drawn == "dataset":
            self._given = self.given_answers(rows)
        else:
            rows = self.source.replayed(step, len(rows), self.accelerator.process_index)
            self._given = [row["completion_ids"] for row in rows]
        self.note_source(drawn)
        return rows

    @abc.abstractmethod
    def note_source(self, drawn: str) -> None:
        """Called with the source of each step."""

    def write(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        if self._given is not None:
            given, self._given = self._given, None
            return given
        if self._writer is None or self.mode == "eval":
            completions = super().write(prompt_ids, *args, **kwargs)
        else:
            with self.model_for_writing() as student:
                completions, self._recorded = self._writer.write(student, prompt_ids)
        if self._fresh is not None:
            pairs = zip(self._fresh, completions, strict=True)
            self.source.keep([{"prompt": row["prompt"], "completion_ids": ids} for row, ids in pairs])
            self._fresh = None
        return completions

    def recorded(self) -> dict[str, list[list[float]]]:
        recorded, self._recorded = self._recorded, {}
        return recorded


def _greedy(logits: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return logits.argmax(-1), {}


def _refuse_to_write(prompt_ids: list[list[int]]) -> list[list[int]]:
    raise AssertionError(f"{len(prompt_ids)} answers are missing after all were written")

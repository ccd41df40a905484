"""The teacher's completions of a data set that has none: written once, ahead of a run, into a file that others can read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from tsdkd.data.completions import has_text
from tsdkd.data.prompts import ASKED, PIECE, columns_of, pieces
from tsdkd.data.rows import read_rows, replace_rows
from tsdkd.rollouts import InterleavedWriter, VLLMWriter, mixed, write_once
from tsdkd.teachers import Teacher
from tsdkd.trainers.host import Host, has_completions, teacher_rows
from tsdkd.trainers.teacher_prompts import TeacherPrompts
from tsdkd.types import RolloutSpec

logger = logging.getLogger(__name__)


def interleaved(host: Host, teacher: Any, rule: Any) -> InterleavedWriter:
    """A writer on the caches of both models, within the run's limits; without a teacher the given model writes alone."""
    return InterleavedWriter(
        teacher,
        rule,
        vocab_size=host.vocab_size,
        without=host.unknown_ids,
        max_new_tokens=host.max_completion_length,
        ends=host.eos_ids,
        pad_id=host.tokenizer.pad_token_id,
        autocast=host.accelerator.autocast,
    )


def refuse_interleaving(host: Host, teacher_model: Any, teacher: Teacher | None, prompts: TeacherPrompts) -> None:
    """Refuse completions that both models write where they cannot.

    Raises:
    ValueError: why.
    """
    args, why = host.args, None
    if teacher_model is None:
        why = "no teacher is in memory"
    elif args.use_vllm:
        why = "use_vllm=True gives generation to vLLM, which holds one model: leave use_vllm out"
    elif host.tools:
        why = "tools need completions of one model: leave tools out"
    elif prompts.expected:
        why = "the teacher has prompts of its own (teacher_prompt): let the student write"
    elif teacher is None or teacher.writes != "interleaved":
        why = "a teacher under ZeRO-3 cannot write token by token while processes end at different lengths: keep it whole"
    elif args.temperature <= 0:
        why = f"temperature={args.temperature} leaves no distribution to draw from: pass one above 0"
    elif args.top_p != 1.0 or args.top_k or args.min_p:
        why = "top_p, top_k and min_p would change the distributions that are mixed: leave them at their defaults"
    elif args.repetition_penalty != 1.0 or args.generation_kwargs:
        why = "repetition_penalty and generation_kwargs are options of one model's generation: leave them out"
    if why:
        raise ValueError(f"the method's completions are written by both models, token by token, but {why}.")


class CompletionsAhead:
    """Has the teacher write.

    Args:
        host: the trainer.
        spec: whose completions the method trains on.
        teacher_model: the teacher's model in this process; None with a vLLM engine of its own.
        teacher_name: its name or folder.
        prompts: what it reads in place of the prompts.
    """

    def __init__(self, host: Host, spec: RolloutSpec, teacher_model: Any, teacher_name: str, prompts: TeacherPrompts) -> None:
        self.host, self.spec, self.teacher_model, self.teacher_name = host, spec, teacher_model, teacher_name
        self.prompts = prompts

    def fill(self, dataset: Any, role: str) -> Any:
        """A data set with the teacher's completions where it has none and the method takes those; earlier ones are read.

        Raises:
            ValueError: a stream, or a file that was written with other settings.
        """
        missing, columns = self.host.args.teacher_writes_missing, columns_of(dataset)
        if not self.spec.need_dataset or not (self.spec.teacher_may_write or missing) or "completion_ids" in columns:
            return dataset
        if not hasattr(dataset, "__len__"):
            if has_completions(columns):
                return dataset
            raise ValueError(
                f"{role} is a stream without a 'completion' column: the teacher can only complete a data set of rows."
            )
        given = list(dataset["completion"]) if "completion" in columns else [None] * len(dataset)
        lacking = [number for number, completion in enumerate(given) if completion is None or not has_text(completion)]
        if has_completions(columns) and not (missing and lacking):
            return dataset
        rows = [row for _, part in pieces(dataset.select(lacking)) for row in part]
        prompts = [ids for start in range(0, len(rows), PIECE) for ids in self._asked(rows[start : start + PIECE])]
        written = self._written(prompts, role)
        self._keep_readable(rows, written)
        ids: list[list[int] | None] = [None] * len(dataset)
        for number, completion_ids in zip(lacking, written, strict=True):
            ids[number] = completion_ids
        return dataset.add_column("completion_ids", ids)

    def _asked(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """What the teacher is asked: its own prompts where rows have them."""
        theirs = self.prompts.of(rows)
        return self.host.tokenize(rows) if theirs is None else theirs

    @property
    def path(self) -> Path:
        """The file of the teacher's completions."""
        args = self.host.args
        return Path(args.teacher_answers or Path(args.output_dir) / "teacher_answers.jsonl")

    def _keep_readable(self, rows: list[dict[str, Any]], written: list[list[int]]) -> None:
        """The completions as rows that anything reads: prompt, completion, ids; those of other data sets stay."""
        host = self.host
        if not host.accelerator.is_main_process:
            return
        texts = host.tokenizer.batch_decode(written, skip_special_tokens=True)
        key = lambda row: json.dumps([row.get("prompt"), row.get("teacher_prompt")])  # noqa: E731
        found = {key(row): row for row in read_rows(self.path, "remove the line")}
        for row, ids, text in zip(rows, written, texts, strict=True):
            completion = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            made = {
                **{name: row[name] for name in ASKED if row.get(name)},
                "completion": completion,
                "completion_ids": ids,
            }
            found[key(row)] = made
        replace_rows(self.path, found.values())

    def _written(self, prompts: list[list[int]], role: str) -> list[list[int]]:
        host, args = self.host, self.host.args
        path = self.path
        settings = {
            "teacher": self.teacher_name,
            "max_completion_length": host.max_completion_length,
            "temperature": args.teacher_answers_temperature,
            "seed": args.seed if args.teacher_answers_temperature else None,
        }
        logger.info("the teacher's completions of %s are in %s", role, path.parent)
        if args.teacher_answers_engine == "vllm":
            return self._by_vllm(path, prompts, settings)
        return write_once(
            path,
            prompts,
            self.by_teacher,
            settings=settings,
            batch_size=teacher_rows(args),
            process=host.accelerator.process_index,
            processes=host.accelerator.num_processes,
            barrier=host.accelerator.wait_for_everyone,
        )

    @torch.no_grad()
    def by_teacher(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The teacher's completions: greedy, or sampled where a temperature is set."""
        temperature = self.host.args.teacher_answers_temperature
        rule = _greedy if temperature == 0 else mixed(1.0, temperature)
        return interleaved(self.host, None, rule).write(self.teacher_model, prompt_ids)[0]

    def _by_vllm(self, path: Path, prompts: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        """One engine, on the first process, writes everything in one batch a thousand; the others read it."""
        host, args = self.host, self.host.args
        alone: dict[str, Any] = {"settings": settings, "batch_size": PIECE}
        if host.accelerator.is_main_process:
            writers: list[VLLMWriter] = []

            def write(prompt_ids: list[list[int]]) -> list[list[int]]:
                if not writers:  # no engine where all is written already
                    writers.append(
                        VLLMWriter(
                            settings["teacher"],
                            temperature=args.teacher_answers_temperature,
                            max_new_tokens=host.max_completion_length,
                            ends=host.eos_ids,
                            vocab_size=host.vocab_size,
                            without=host.unknown_ids,
                            **({"revision": args.teacher_model_revision} if args.teacher_model_revision else {}),
                            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                            max_model_len=max(map(len, prompts)) + host.max_completion_length,
                            trust_remote_code=args.trust_remote_code,
                            seed=args.seed,
                        )
                    )
                return writers[0](prompt_ids)

            write_once(path, prompts, write, **alone)
            for writer in writers:
                writer.close()
        host.accelerator.wait_for_everyone()
        return write_once(path, prompts, _refuse_to_write, **alone)


def _greedy(logits: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return logits.argmax(-1), {}


def _refuse_to_write(prompt_ids: list[list[int]]) -> list[list[int]]:
    raise AssertionError(f"{len(prompt_ids)} completions are missing after all were written")

"""The teacher's completions of a data set that has none: written once, ahead of a run, into a file that others can read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from tsdkd.data.prompts import PIECE, columns_of, pieces
from tsdkd.rollouts import InterleavedWriter, VLLMWriter, mixed, write_once
from tsdkd.trainers.host import Host, has_completions, teacher_rows
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


class CompletionsAhead:
    """Has the teacher write.

    Args:
        host: the trainer.
        spec: whose completions the method trains on.
        teacher_model: the teacher's model in this process; None with a vLLM engine of its own.
        teacher_name: its name or folder.
    """

    def __init__(self, host: Host, spec: RolloutSpec, teacher_model: Any, teacher_name: str) -> None:
        self.host, self.spec, self.teacher_model, self.teacher_name = host, spec, teacher_model, teacher_name

    def fill(self, dataset: Any, role: str) -> Any:
        """A data set with the teacher's completions where it has none and the method takes those; earlier ones are read.

        Raises:
            ValueError: a stream, or a file that was written with other settings.
        """
        if not (self.spec.need_dataset and self.spec.teacher_may_write):
            return dataset
        if has_completions(columns_of(dataset)):
            return dataset
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{role} is a stream without a 'completion' column: the teacher can only complete a data set of rows."
            )
        prompts = [ids for _, rows in pieces(dataset) for ids in self.host.tokenize(rows)]
        return dataset.add_column("completion_ids", self._written(prompts, role))

    def _written(self, prompts: list[list[int]], role: str) -> list[list[int]]:
        host, args = self.host, self.host.args
        path = Path(args.teacher_answers or Path(args.output_dir) / "teacher_answers.jsonl")
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

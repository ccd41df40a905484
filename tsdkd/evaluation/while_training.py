"""Benchmarks while training: the student of every so many steps by the code of `tsdkd evaluate`, and the best one kept."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from tsdkd.data.rows import ScoreRow, append_rows, read_rows, replace_rows
from tsdkd.evaluation import harness
from tsdkd.evaluation import tasks as harness_tasks
from tsdkd.evaluation.run import Model, Settings, rows_of
from tsdkd.trainers import TokenDistillTrainer
from tsdkd.trainers.random_state import random_state_kept

logger = logging.getLogger(__name__)


class EvaluateWhileTraining(TrainerCallback):
    """Scores the student before the first step, every `every` steps and at the end, by the rollout engine that is in memory, or
    by transformers.

    Rows go to `benchmarks.jsonl` in the run's folder, with their step; scores to the log as `eval_TASK/METRIC`. The main
    process scores while the others wait (up to `ddp_timeout`); the training's random state stays as it was.

    Args:
        trainer: whose student it is.
        tasks: names of the harness.
        every: optimizer steps between two scorings.
        best: `TASK/METRIC` of the score that the best checkpoint is kept by, in `best/`; None keeps none.
        include_path: folders of task YAMLs.
        chat_template, limit, max_gen_toks: as `tsdkd evaluate` has them.
        batch_size: of transformers' generation.

    Raises:
        ValueError: an unknown task, one that runs code, one whose data are not to be had; a `best` that no task has.
    """

    def __init__(
        self,
        trainer: TokenDistillTrainer,
        tasks: list[str],
        every: int,
        *,
        best: str | None = None,
        include_path: list[str | Path] | None = None,
        chat_template: bool = False,
        limit: int | None = None,
        max_gen_toks: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if every < 1:
            raise ValueError(f"eval_every={every}: it must be 1 or more.")
        self.trainer, self.tasks, self.every, self.best, self.batch_size = trainer, tasks, every, best, batch_size
        engine = "vllm" if trainer.generation.has_engine else "hf"
        self.settings = Settings(chat_template, limit, max_gen_toks, seed=trainer.args.seed, engine=engine, dtype="training")
        self.manager = harness_tasks.ready_tasks(tasks, include_path or [])  # what is missing is said before the first step
        there = [f"{task}/{metric}" for task in tasks for metric in harness_tasks.metrics_of(self.manager, task)]
        if best is not None and best not in there:
            raise ValueError(f"eval_best={best!r} is no score of these tasks; there are: {', '.join(there)}.")
        if chat_template and trainer.processing_class.chat_template is None:
            raise ValueError(
                "eval_chat_template puts the items of eval_tasks as chats, but the student's tokenizer has no chat template: "
                "leave it out, or set tokenizer.chat_template."
            )
        self._scored: int | None = None

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        """What stands of steps that this run has yet to make is another run's: set aside, not competed with. A run that starts
        is scored before its first step, and its start may be the best."""
        if self.trainer.accelerator.is_main_process:
            self._set_aside(state.global_step)
        self.trainer.accelerator.wait_for_everyone()
        if state.global_step == 0:
            self.run(0)

    def _set_aside(self, step: int) -> None:
        rows = self.folder / "benchmarks.jsonl"
        if rows.is_file():
            found = read_rows(rows, "remove it, or the file")
            ours = [row for row in found if row["step"] <= step and step]
            if len(ours) < len(found):
                rows.replace(rows.with_name("benchmarks.before.jsonl"))
            replace_rows(rows, ours)
        record = self.folder / "best" / "best.json"
        if record.is_file() and (json.loads(record.read_text())["step"] > step or not step):
            record.replace(record.with_name("best.before.json"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.run(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step != self._scored:
            self.run(state.global_step)

    def run(self, step: int) -> dict[str, float]:
        """Score the student of now, on every process."""
        self._scored = step
        trainer = self.trainer
        rows: list[ScoreRow] = []
        failure: Exception | None = None
        was_training = trainer.model.training
        trainer.model.eval()
        with random_state_kept(), ExitStack() as stack:
            engine = stack.enter_context(trainer.rollout_engine())
            student = stack.enter_context(trainer.student()) if engine is None else None
            if trainer.accelerator.is_main_process:
                try:
                    rows = self._rows(engine, student, step)
                except Exception as error:  # the others wait, and stop with this one
                    failure = error
            (first,) = broadcast_object_list([None if failure is None else str(failure)])
        if failure is not None:
            raise failure
        if first is not None:
            raise RuntimeError(f"the first process could not score the student of step {step}: {first}")
        (scores,) = broadcast_object_list([{row.name: row.score for row in reversed(rows)}])
        due = trainer.control.should_log  # the step's own log, which this one would take for done
        trainer.log({f"eval_{name}": value for name, value in scores.items()})
        trainer.control.should_log = due
        self._keep_best(scores, rows, step)
        trainer.model.train(was_training)
        return scores

    def _rows(self, engine: Any, student: Any, step: int) -> list[ScoreRow]:
        trainer = self.trainer
        tokenizer = trainer.processing_class
        if engine is not None:
            path = student_path(trainer)
            lm = harness.vllm_model(path, engine=engine, tokenizer=getattr(tokenizer, "name_or_path", path))
        else:
            lm = harness.hf_model(student, tokenizer=tokenizer, batch_size=self.batch_size)
        rows: list[ScoreRow] = []
        name = trainer.args.output_dir
        model = Model(name, f"step {step}", Path(name).name)
        for task in self.tasks:
            scores, _ = harness.score_task(lm, self.manager, task, **self.settings.of_scoring())
            digest = harness_tasks.task_digest(self.manager, task)
            rows += rows_of(scores, task, model, self.settings, digest, step=step, spent=trainer.spent)
        append_rows(self.folder / "benchmarks.jsonl", [row.to_json() for row in rows])
        return rows

    def _keep_best(self, scores: dict[str, float], rows: list[ScoreRow], step: int) -> None:
        if self.best is None:
            return
        record = self.folder / "best" / "best.json"
        before = json.loads(record.read_text())["score"] if record.is_file() else None
        higher = next((row.higher_is_better for row in rows if row.name == self.best), True)
        (higher,) = broadcast_object_list([higher])
        score = scores[self.best]
        if before is not None and not (score > before if higher else score < before):
            return
        self.trainer.save_model(str(record.parent))
        if self.trainer.accelerator.is_main_process:
            record.write_text(json.dumps({"name": self.best, "score": score, "step": step}) + "\n")
        self.trainer.accelerator.wait_for_everyone()


def student_path(trainer: TokenDistillTrainer) -> str:
    """Where the student was loaded from: its shape and tokenizer are there."""
    return trainer.accelerator.unwrap_model(trainer.model).config._name_or_path

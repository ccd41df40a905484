"""What scores a comparison's students: problems with answers, or tasks of the harness. Both give `ScoreRow`s."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tsdkd.data.rows import ScoreRow, lines_of
from tsdkd.demo.problems import Problem, held_out


class Scorer(Protocol):
    """From a trained student to its scores.

    Attributes:
        settings: what a row says of the scoring.
        contents: what the scores depend on, as texts.
    """

    settings: dict[str, Any]
    contents: list[str]

    def __call__(self, trainer: Any, label: str) -> list[ScoreRow]:
        """The scores of a trainer's student."""
        ...

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        """What a comparison's row keeps of them."""
        ...


def problems_at(path: Path | None) -> list[Problem]:
    """The problems to score on: a JSONL file's `question` and `answer`, or the demo's held-out ones.

    Raises:
        ValueError: a line without them, or no line at all.
    """
    if path is None:
        from tsdkd.demo.run import HELD_OUT_SEED, LEVELS

        return held_out(1000, HELD_OUT_SEED, set(), LEVELS)
    problems = []
    for number, line in lines_of(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}).") from error
        if "question" not in row or "answer" not in row:
            raise ValueError(f"{path}, line {number} has the keys {', '.join(row)}: a problem has 'question' and 'answer'.")
        problems.append(Problem(row["question"], "", str(row["answer"]), 0))
    if not problems:
        raise ValueError(f"{path} holds no problems.")
    return problems


class OnProblems:
    """The accuracy of greedy completions of problems, with its 95 % Wilson interval."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.settings, self.contents = {"problems": len(problems)}, [repr(problems)]

    def __call__(self, trainer: Any, label: str) -> list[ScoreRow]:
        from tsdkd.demo.scoring import accuracy

        longest, as_chat = trainer.max_completion_length, trainer.has_chats  # asked as it was trained
        found = accuracy(trainer.model, trainer.processing_class, self.problems, longest, as_chat, rendering=trainer.rendering)
        interval = {"low": found["low"], "high": found["high"]}
        n = int(found["n"])
        return [ScoreRow(task="problems", metric="accuracy", score=found["accuracy"], n=n, label=label, more=interval)]

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        (row,) = scores
        return {"accuracy": row.score, **row.more, "n": row.n}


class OnTasks:
    """Tasks of `tsdkd evaluate`; what cannot be scored is refused here, before the first run.

    Args:
        tasks: their names.
        include_path: folders of task YAMLs.
        chat_template, limit: as `tsdkd evaluate` has them.

    Raises:
        ValueError: an unknown task, one that runs code, one whose data are not to be had.
    """

    def __init__(self, tasks: list[str], include_path: Sequence[Any], *, chat_template: bool, limit: int | None) -> None:
        from tsdkd.evaluation.tasks import ready_tasks

        self.tasks, self.how = tasks, {"chat_template": chat_template, "limit": limit}
        self.manager = ready_tasks(tasks, include_path)
        self.settings = {"problems": 0, "eval": [",".join(tasks), chat_template, limit]}
        self.contents = [repr([])]

    def __call__(self, trainer: Any, label: str) -> list[ScoreRow]:
        from tsdkd.evaluation import harness

        rows = []
        with trainer.student() as student:
            lm = harness.hf_model(student, tokenizer=trainer.processing_class, batch_size=64)
            for task in self.tasks:
                (first, *_), _ = harness.score_task(lm, self.manager, task, **self.how)
                rows.append(ScoreRow(task=task, metric=first.metric, score=first.value, n=first.n, label=label))
        return rows

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        return {"scores": {row.name: row.score for row in scores}, "n": {row.task: row.n for row in scores}}

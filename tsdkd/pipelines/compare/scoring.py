"""What scores a comparison's students: problems with answers, or tasks of the harness. Both give `ScoreRow`s."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from tsdkd.data.answers import LOOKED_FOR, final_answer
from tsdkd.data.rows import ScoreRow, parsed_lines
from tsdkd.demo.problems import Problem, held_out


class Scorer(Protocol):
    """From a model to its scores.

    Attributes:
        settings: what a row says of the scoring.
        contents: what the scores depend on, as texts.
    """

    settings: dict[str, Any]
    contents: list[str]

    def check(self, trainer: Any) -> None:
        """Refuse what could not be scored, before it is trained."""
        ...

    def __call__(self, trainer: Any, label: str, model: Any = None) -> list[ScoreRow]:
        """The scores of a trainer's student, or of another model of its family."""
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
    for number, row in parsed_lines(path):
        if "question" not in row or "answer" not in row:
            raise ValueError(f"{path}, line {number} has the keys {', '.join(row)}: a problem has 'question' and 'answer'.")
        problems.append(Problem(row["question"], "", str(row["answer"]), 0))
    if not problems:
        raise ValueError(f"{path} holds no problems.")
    return problems


class OnProblems:
    """The accuracy of greedy completions of problems, with its 95 % Wilson interval.

    Args:
        problems: with their answers.
        pattern: of a final answer; None: GSM8K's or a box.
        say: what tells of answers that state none.
    """

    def __init__(self, problems: list[Problem], pattern: str | None = None, say: Callable[[str], None] = print) -> None:
        self.problems, self.pattern, self.say = problems, pattern, say
        self.settings: dict[str, Any] = {"problems": len(problems)}
        if pattern is not None:
            self.settings["answer_pattern"] = pattern
        self.contents = [repr(problems)]

    def check(self, trainer: Any) -> None:
        """Text or chats: problems are put as the prompts were."""

    def __call__(self, trainer: Any, label: str, model: Any = None) -> list[ScoreRow]:
        from tsdkd.demo.scoring import graded, share

        longest, as_chat = trainer.max_completion_length, trainer.has_chats  # asked as it was trained
        model = trainer.model if model is None else model
        how = {"rendering": trainer.rendering, "pattern": self.pattern}
        answered = graded(model, trainer.processing_class, self.problems, longest, as_chat, **how)
        found = share([mark for _, mark in answered])
        silent = [text for text, _ in answered if final_answer(text, self.pattern) is None]
        if silent:
            shown = "; ".join(repr(text[:80]) for text in silent[:3])
            looked_for = repr(self.pattern) if self.pattern else LOOKED_FOR
            self.say(f"{label}: {len(silent)} of {len(answered)} answers state no final answer ({looked_for}), e.g. {shown}")
        interval = {"low": found["low"], "high": found["high"], "ungraded": len(silent)}
        right = "".join("1" if mark else "0" for _, mark in answered)
        n = int(found["n"])
        row = ScoreRow(task="problems", metric="accuracy", score=found["accuracy"], n=n, label=label, more=interval)
        return [dataclasses.replace(row, items={"right": right})]

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        (row,) = scores
        return {"accuracy": row.score, **row.more, "n": row.n, "right": (row.items or {}).get("right")}


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

    def check(self, trainer: Any) -> None:
        """A chat template where items are put as chats.

        Raises:
            ValueError: none is there.
        """
        if self.how["chat_template"] and trainer.processing_class.chat_template is None:
            raise ValueError(
                "--eval_chat_template puts the items as chats, and the student's tokenizer has no chat template: leave it out, "
                "or set tokenizer.chat_template."
            )

    def __call__(self, trainer: Any, label: str, model: Any = None) -> list[ScoreRow]:
        from tsdkd.evaluation import harness

        rows = []
        with trainer.student() if model is None else nullcontext(model) as scored:
            lm = harness.hf_model(scored, tokenizer=trainer.processing_class, batch_size=64)
            for task in self.tasks:
                (first, *_), _ = harness.score_task(lm, self.manager, task, **self.how)
                rows.append(ScoreRow(task=task, metric=first.metric, score=first.value, n=first.n, label=label))
        return rows

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        return {"scores": {row.name: row.score for row in scores}, "n": {row.task: row.n for row in scores}}

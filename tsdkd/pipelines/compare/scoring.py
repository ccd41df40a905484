"""What scores a comparison's students: problems with answers, or tasks of the harness. Both give `ScoreRow`s."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsdkd.checks import check_count, check_positive
from tsdkd.data.answers import LOOKED_FOR, final_answer, is_correct, same_answer
from tsdkd.data.rows import ScoreRow, parsed_lines
from tsdkd.demo.problems import Problem, held_out
from tsdkd.rollouts.greedily import written_by_sampling, written_greedily


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


@dataclass(frozen=True)
class Samples:
    """How answers are sampled beside the greedy ones.

    Args:
        count: k answers of a problem, 1 to 9.
        problems: of the first so many problems; None: of all.
        temperature: at which they are drawn.
        seed: of the draw, the same for all runs.

    Raises:
        ValueError: a number outside its range.
    """

    count: int
    problems: int | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("samples", self.count, smallest=1)
        if self.count > 9:
            raise ValueError(f"samples={self.count}: a row keeps a digit a problem; pass 9 at most.")
        if self.problems is not None:
            check_count("sampled_problems", self.problems, smallest=1)
        check_positive("sample_temperature", self.temperature)


class OnProblems:
    """The accuracy of greedy completions of problems, with its 95 % Wilson interval and their mean length in tokens; of sampled
    ones, where they are asked for, too.

    A row of sampled ones has `sampled_accuracy` (of all samples), `pass_at_k` (problems of which one of the k is right) and
    `calibration_error`: problems are sorted by how many of their samples agree with the greedy answer, and the error is the
    mean over problems of |accuracy of the greedy answers of the same agreement − that share|. `sampled_right` and `agreeing`
    are the numbers of samples behind them, a digit a problem.

    Args:
        problems: with their answers.
        pattern: of a final answer; None: GSM8K's or a box.
        say: what tells of answers that state none.
        max_new_tokens: of an answer; None: as many as the run's completions had.
        samples: what is sampled beside.
    """

    def __init__(
        self,
        problems: list[Problem],
        pattern: str | None = None,
        say: Callable[[str], None] = print,
        max_new_tokens: int | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.problems, self.pattern, self.say = problems, pattern, say
        self.max_new_tokens, self.samples = max_new_tokens, samples
        self.settings: dict[str, Any] = {"problems": len(problems)}
        if pattern is not None:
            self.settings["answer_pattern"] = pattern
        if max_new_tokens is not None:
            self.settings["max_new_tokens"] = max_new_tokens
        if samples is not None:
            self.settings["samples"] = dataclasses.asdict(samples)
        self.contents = [repr(problems)]

    def check(self, trainer: Any) -> None:
        """Text or chats: problems are put as the prompts were."""

    def __call__(self, trainer: Any, label: str, model: Any = None) -> list[ScoreRow]:
        from tsdkd.demo.scoring import share

        model = trainer.model if model is None else model
        was_training = model.training
        model.eval()
        longest = self.max_new_tokens or trainer.max_completion_length
        questions = [problem.question for problem in self.problems]  # asked as it was trained
        asked = [[{"role": "user", "content": question}] for question in questions] if trainer.has_chats else questions
        prompts = trainer.rendering.prompts(asked)
        tokenizer = trainer.processing_class
        ids = written_greedily(model, tokenizer, prompts, longest)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        marks = [self._right(text, problem) for text, problem in zip(texts, self.problems, strict=True)]
        found = share(marks)
        silent = [text for text in texts if final_answer(text, self.pattern) is None]
        if silent:
            shown = "; ".join(repr(text[:80]) for text in silent[:3])
            looked_for = repr(self.pattern) if self.pattern else LOOKED_FOR
            self.say(f"{label}: {len(silent)} of {len(texts)} answers state no final answer ({looked_for}), e.g. {shown}")
        more: dict[str, Any] = {"low": found["low"], "high": found["high"], "ungraded": len(silent)}
        more["answer_tokens"] = round(sum(map(len, ids)) / len(ids), 2)
        items = {"right": "".join("1" if mark else "0" for mark in marks)}
        if self.samples is not None:
            figures, own = self._sampled(model, tokenizer, prompts, texts, marks, longest)
            more, items = {**more, **figures}, {**items, **own}
        model.train(was_training)
        n = int(found["n"])
        row = ScoreRow(task="problems", metric="accuracy", score=found["accuracy"], n=n, label=label, more=more)
        return [dataclasses.replace(row, items=items)]

    def _right(self, text: str, problem: Problem) -> bool:
        return is_correct(text, problem.answer, self.pattern)

    def _sampled(
        self, model: Any, tokenizer: Any, prompts: list[list[int]], greedy: list[str], marks: list[bool], longest: int
    ) -> tuple[dict[str, float], dict[str, str]]:
        """What sampled answers say, and of each problem how many are right and how many agree with the greedy one."""
        assert self.samples is not None
        k, problems = self.samples.count, self.problems[: self.samples.problems]
        how: dict[str, Any] = {"seed": self.samples.seed, "temperature": self.samples.temperature}
        repeated = [prompt for prompt in prompts[: len(problems)] for _ in range(k)]
        texts = tokenizer.batch_decode(
            written_by_sampling(model, tokenizer, repeated, longest, **how), skip_special_tokens=True
        )
        right, agreeing = [], []
        for place, problem in enumerate(problems):
            own, answer = texts[place * k : (place + 1) * k], final_answer(greedy[place], self.pattern)
            right.append(sum(self._right(text, problem) for text in own))
            agreeing.append(0 if answer is None else sum(self._agrees(text, answer) for text in own))
        figures = {
            "sampled_accuracy": sum(right) / (k * len(problems)),
            "pass_at_k": sum(count > 0 for count in right) / len(problems),
            "calibration_error": calibration_error(agreeing, marks[: len(problems)], k),
        }
        return figures, {"sampled_right": "".join(map(str, right)), "agreeing": "".join(map(str, agreeing))}

    def _agrees(self, text: str, answer: str) -> bool:
        return same_answer(final_answer(text, self.pattern), answer)

    def figures(self, scores: Sequence[ScoreRow]) -> dict[str, Any]:
        (row,) = scores
        return {"accuracy": row.score, **row.more, "n": row.n, **(row.items or {})}


def calibration_error(agreeing: Sequence[int], right: Sequence[bool], count: int) -> float:
    """The mean over problems of |accuracy − confidence| of their bin (expected calibration error): confidence is the share of
    `count` samples that agree with the greedy answer, a bin a share, accuracy that of the bin's greedy answers.

    Example:
        >>> calibration_error([4, 4, 2], [True, False, True], 4)
        0.5
    """
    bins: dict[int, list[bool]] = {}
    for agreed, mark in zip(agreeing, right, strict=True):
        bins.setdefault(agreed, []).append(mark)
    return sum(abs(sum(own) - len(own) * agreed / count) for agreed, own in bins.items()) / len(right)


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

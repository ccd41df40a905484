"""What trained students answer to test problems, and the scores of that: accuracy and mean output tokens, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import ScoreRow, read_scores
from tsdkd.pipelines.problems import problems_of
from tsdkd.pipelines.stage import Stage, Work, contents_of, digest_of
from tsdkd.pipelines.students import Inference, student_answers
from tsdkd.provenance import provenance


class Tested(Stage):
    """What students answer to the test problems, and whether it is right.

    Args:
        after: the stages that make them.
        test: a file of rows with `question` and `answer`.
        starts: models that are there before, by label.
        trained: folders of trained ones by label, once the stages are made.
        how: they answer.
        prompt: of a question and a label, what the student is asked.
        right: of an answer and the label's; None: answers are not graded here.
        settings: what the rows depend on beside those.
    """

    def __init__(
        self,
        after: Sequence[Stage],
        test: str,
        starts: Mapping[str, str],
        trained: Callable[[], Mapping[str, Path]],
        how: Inference,
        prompt: Callable[[str, str], str],
        right: Callable[[str, str], bool] | None,
        **settings: Any,
    ) -> None:
        super().__init__("tested", tuple(after), {"max_tokens": how.max_tokens, "engine": how.engine, **settings})
        self.test, self.starts, self.trained, self.how, self.prompt, self.right = test, starts, trained, how, prompt, right
        for label, name in starts.items():
            self.depends_on(label, name)
        self.depends_on("test", test)

    def check(self) -> None:
        problems_of(self.test, labelled=True)

    def make(self, work: Work) -> None:
        problems = problems_of(self.test, labelled=True)
        students = {**self.starts, **{label: str(folder) for label, folder in self.trained().items()}}
        for label, student in students.items():
            left = [row for row in problems if f"{label}/{row['problem']}" not in work.done]
            prompts = [self.prompt(row["question"], label) for row in left]
            for row, answer in zip(left, student_answers(student, prompts, self.how), strict=True):
                right = None if self.right is None else self.right(answer["text"], row["label"])
                work.add({"id": f"{label}/{row['problem']}", "student": label, **row, **answer, "right": right})
                work.progress(len(work.done), len(students) * len(problems))
        work.count("answers", len(work.done))


class Scores(Stage):
    """Accuracy and mean output tokens of each student.

    Args:
        tested: the stage before it.
        task: its name in the rows.
        seed: of the run, for the rows' origin.
        settings: of the training.
    """

    def __init__(self, tested: Tested, task: str, seed: int, **settings: Any) -> None:
        super().__init__("scores", [tested], {"task": task, **settings})
        self.tested, self.task, self.seed, self.training = tested, task, seed, settings

    def make(self, work: Work) -> None:
        by_student: dict[str, list[dict[str, Any]]] = {}
        for row in self.tested.rows:
            by_student.setdefault(row["student"], []).append(row)
        for label, answers in by_student.items():
            made = {row.metric: row for row in self._rows(label, answers)}
            for metric, score in made.items():
                work.add({"id": f"{label}/{metric}", **score.to_json()})
            right = f"{made['accuracy'].score:.1%} at " if "accuracy" in made else ""
            work.counts[label] = f"{right}{made['tokens'].score:.1f} tokens"

    def _rows(self, label: str, answers: list[dict[str, Any]]) -> list[ScoreRow]:
        tested, n = self.tested, len(answers)
        folder = tested.trained().get(label)
        shared: dict[str, Any] = {
            "task": self.task,
            "requested": Path(tested.test).name,
            "task_digest": digest_of(tested.files[0])[:16] if tested.files else "",
            "n": n,
            "label": label,
            "model": tested.starts[label] if folder is None else folder.name,
            "model_digest": contents_of(tested.starts[label] if folder is None else str(folder)),
            "max_gen_toks": tested.how.max_tokens,
            "settings": {"engine": tested.how.engine, **self.training},
            "origin": provenance(self.seed),
        }
        tokens = sum(row["tokens"] for row in answers) / n
        cut = {"cut": sum(not row["ended"] for row in answers)}
        made = [ScoreRow(metric="tokens", score=tokens, main=False, higher_is_better=False, more=cut, **shared)]
        if tested.right is not None:
            right = [row["right"] for row in answers]
            low, high = wilson_interval(sum(right), n)
            items = {"right": "".join("1" if mark else "0" for mark in right)}
            more = {"low": low, "high": high}
            made.append(ScoreRow(metric="accuracy", score=sum(right) / n, items=items, more=more, **shared))
        return made


def scored(file: Path) -> list[dict[str, Any]]:
    """Each student's accuracy with its interval and its mean output tokens, in the order in which they were scored."""
    made: dict[str, dict[str, Any]] = {}
    for row in read_scores(file):
        own = made.setdefault(row.label, {"label": row.label, "n": row.n})
        own[row.metric] = row.score
        own.update({name: row.more[name] for name in ("low", "high", "cut") if name in row.more})
    return list(made.values())


def score_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of `scored`."""
    lines = ["| student | accuracy | 95 % | mean output tokens | cut | n |", "|---|---|---|---|---|---|"]
    for row in rows:
        right = f"{row['accuracy']:.1%} | {row['low']:.1%}-{row['high']:.1%}" if "accuracy" in row else "not scored | "
        lines.append(f"| {row['label']} | {right} | {row['tokens']:.1f} | {row.get('cut', 0)} | {row['n']} |")
    return "\n".join(lines)

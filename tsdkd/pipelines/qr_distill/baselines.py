"""What the paper compares QR-Distill with (3.4, Table 1), as stages of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.paths import PATH, Correct, OfQR, Paths
from tsdkd.pipelines.qr_distill.prompts import SINGLE, verdict
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.pipelines.templates import filled
from tsdkd.rollouts.api_models import Asked


class Questions(OfQR):
    """One more question for each that has a path: the teacher's, by one of `requests`.

    Args:
        request: its name.
        after: a stage of paths.
        labelled: its answer is the old one's; else it has no label.
    """

    columns = ("id", "problem", "question", "label")

    def __init__(self, config: QRConfig, request: str, after: Stage, labelled: bool) -> None:
        self.template, self.labelled = config.requests[request], labelled
        super().__init__(request, config, [after], teacher=config.teacher.settings, template=self.template)

    def _asked(self) -> tuple[list[dict[str, Any]], list[Asked]]:
        rows = list({row["problem"]: row for row in self.after[0].rows}.values())
        texts = [filled(self.template, question=row["question"], answer=row["label"]) for row in rows]
        return rows, [Asked([{"role": "user", "content": text}]) for text in texts]

    def plan(self) -> Planned:
        return self.planned(self.config.teacher, lambda: self._asked()[1], 1)

    def make(self, work: Work) -> None:
        rows, asked = self._asked()
        for row, reply in zip(rows, self.ask(self.config.teacher, asked, work), strict=True):
            text = "" if "error" in reply else reply["text"].strip()
            wrong = "empty" if not text else "as it was" if text == row["question"] else ""
            wrong = "cut" if reply.get("finish") == "length" else wrong
            if wrong:
                work.count(wrong)
                continue
            old = {"of": row["question"], "answer": row["label"]}
            label = row["label"] if self.labelled else None
            work.add({"id": str(row["problem"]), "problem": row["problem"], "question": text, "label": label, **old})
        work.count("questions", len(work.done))


class Consistent(OfQR):
    """The paths of inverse questions whose answers agree with the questions, as the teacher holds."""

    columns = PATH

    def __init__(self, config: QRConfig, paths: Stage) -> None:
        self.template = config.requests["consistent"]
        super().__init__("consistent", config, [paths], teacher=config.teacher.settings, template=self.template)

    def _rows(self) -> list[dict[str, Any]]:
        """The paths that are whole."""
        return [row for row in self.after[0].rows if row.get("finish") != "length" and row["path"].strip()]

    def _asked(self) -> list[Asked]:
        texts = [
            filled(self.template, question=row["of"], answer=row["answer"], inverse=row["question"], path=row["path"])
            for row in self._rows()
        ]
        return [Asked([{"role": "user", "content": text}]) for text in texts]

    def plan(self) -> Planned:
        return self.planned(self.config.teacher, self._asked, 1)

    def make(self, work: Work) -> None:
        work.count("cut or empty", len(self.after[0].rows) - len(self._rows()))
        for row, reply in zip(self._rows(), self.ask(self.config.teacher, self._asked(), work), strict=True):
            sound = None if "error" in reply else verdict(reply["text"])
            work.count({True: "valid", False: "invalid", None: "doubtful"}[sound])
            if sound:
                work.add(row)
        work.count("kept", len(work.done))


class Lessons(OfQR):
    """What students are taught, where it is not the paths themselves.

    Args:
        after: the stages that it is made of.
        rows: what makes it of their rows.
    """

    columns = PATH

    def __init__(self, config: QRConfig, after: Sequence[Stage], rows: Callable[..., Iterator[dict[str, Any]]]) -> None:
        super().__init__("lessons", config, after, marks=config.marks, answer_alone=config.answer_alone, rows=rows.__name__)
        self.of = rows

    def make(self, work: Work) -> None:
        for number, row in enumerate(self.of(self.config, *(stage.rows for stage in self.after))):
            work.add({**row, "id": str(number)})
        work.count("rows", len(work.done))


def two_tasks(config: QRConfig, paths: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Distilling Step-by-Step (Hsieh et al., 2023): a question's path and its answer alone, as two tasks."""
    marks = config.marks
    for row in paths:
        alone = filled(config.answer_alone, answer=row["label"])
        yield {**row, "question": marks["rationale"] + row["question"], "style": "rationale"}
        yield {**row, "question": marks["label"] + row["question"], "path": alone, "style": "label"}


def three_tasks(config: QRConfig, paths: list[dict[str, Any]], inverses: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """RevTHINK (Chen et al., 2024a): question to path, question to inverse question, inverse question to its path."""
    agreed = {row["problem"]: row for row in inverses}
    for row in paths:
        if row["problem"] not in agreed:
            continue
        inverse = agreed[row["problem"]]
        yield row
        yield {**row, "question": config.marks["inverse"] + row["question"], "path": inverse["question"], "style": "inverse"}
        yield {**row, "question": inverse["question"], "path": inverse["path"], "style": "path of the inverse"}


def baseline(config: QRConfig) -> list[Stage]:
    """The stages of one of the paper's baselines up to what students are taught, which is the last one's."""
    if config.recipe == "sft":
        paths = Paths(config)
        return [paths, Correct(config, [paths])]
    styles = {SINGLE: config.styles[SINGLE]}
    if config.recipe == "answer_aug":  # another path of the same style; a teacher at temperature 0 writes it twice
        paths = Paths(config, styles=styles, samples=2)
        return [paths, Correct(config, [paths])]
    paths = Paths(config, styles=styles)
    if config.recipe in ("rephrase", "question_aug"):
        rephrased = config.recipe == "rephrase"
        more = Questions(config, "rephrase" if rephrased else "new_question", paths, labelled=rephrased)
        their = Paths(config, f"{more.name}-paths", {config.recipe: styles[SINGLE]}, more)
        return [paths, more, their, Correct(config, [paths, their])]
    right = Correct(config, [paths])
    if config.recipe == "skd":
        return [paths, right]
    if config.recipe == "step_by_step":
        return [paths, right, Lessons(config, [right], two_tasks)]
    inverse = Questions(config, "inverse", right, labelled=False)
    their = Paths(config, "inverse-paths", {"inverse": styles[SINGLE]}, inverse)
    agreed = Consistent(config, their)
    return [paths, right, inverse, their, agreed, Lessons(config, [right, agreed], three_tasks)]

"""The stages that make reasoning paths and filter them (QR-Distill, 2.2 and 2.3). What is trained on is the filtered file."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tsdkd.pipelines.asking import OfRun, ask, planned
from tsdkd.pipelines.problems import problems_of
from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.grading import right
from tsdkd.pipelines.qr_distill.prompts import verdict
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.pipelines.templates import filled
from tsdkd.rollouts.api_models import APIModel, Asked

PATH = ("id", "problem", "question", "label", "style", "path")


class OfQR(OfRun[QRConfig]):
    """A stage of a run, which asks one model at a time."""

    def ask(self, model: APIModel, asked: list[Asked], work: Work) -> list[dict[str, Any]]:
        """One model's replies."""
        return ask([model], {model.name: asked}, self.replies, work, self.config.allow_failed)[model.name]

    def planned(self, model: APIModel, asked: list[Asked]) -> Planned:
        """What that would be."""
        return planned([model], {model.name: asked}, self.replies)


class Paths(OfQR):
    """The teacher's path of each style to each question (2.2)."""

    columns = PATH

    def __init__(self, config: QRConfig) -> None:
        super().__init__("paths", config, teacher=config.teacher.settings, styles=config.styles, ending=config.ending)
        self.settings["limit"] = config.limit
        self.depends_on("problems", config.problems)

    def _asked(self) -> tuple[list[dict[str, Any]], list[Asked]]:
        problems = problems_of(self.config.problems, self.config.limit, labelled=True)
        texts = [
            filled(template, question=row["question"]) + self.config.ending
            for row in problems
            for template in self.config.styles.values()
        ]
        return problems, [Asked([{"role": "user", "content": text}]) for text in texts]

    def check(self) -> None:
        self.config.teacher.check()
        self._asked()

    def plan(self) -> Planned:
        return self.planned(self.config.teacher, self._asked()[1])

    def make(self, work: Work) -> None:
        problems, asked = self._asked()
        replies = iter(self.ask(self.config.teacher, asked, work))
        for problem in problems:
            for style in self.config.styles:
                reply = next(replies)
                if "error" in reply:
                    continue
                row = {"id": f"{problem['problem']}/{style}", **problem, "style": style, "path": reply["text"]}
                work.add({**row, "finish": reply["finish"]})
        work.count("paths", len(work.done))


class Correct(OfQR):
    """The paths whose final answer is the label (2.3, step 1), by the grader that scores students."""

    columns = PATH

    def __init__(self, config: QRConfig, paths: Stage) -> None:
        super().__init__("correct", config, [paths], answer=config.answer)

    def make(self, work: Work) -> None:
        wrong: Counter[str] = Counter()
        for row in self.after[0].rows:
            if row.get("finish") == "length":
                wrong["cut"] += 1
            elif not row["path"].strip():
                wrong["empty"] += 1
            elif right(row["path"], row["label"], self.config.answer):
                work.add(row)
                work.count(f"right, {row['style']}")
            else:
                wrong[f"wrong, {row['style']}"] += 1
        work.count("kept", len(work.done))
        work.counts.update(sorted(wrong.items()))
        if not work.done:
            first = next((row["path"] for row in self.after[0].rows), "")
            raise ValueError(
                f"no path reaches its label's answer; the first is {first[:300]!r}. Look at `ending` and `answer`."
            )


class Judged(OfQR):
    """The paths that the judge holds to be sound (2.3, step 2): the filtered set."""

    columns = PATH

    def __init__(self, config: QRConfig, correct: Stage) -> None:
        judge = config.judge
        settings = {"judge": None} if judge is None else {"judge": judge.settings, "prompt": config.judge_prompt}
        super().__init__("judged", config, [correct], keep_doubtful=config.keep_doubtful, **settings)

    def _asked(self) -> list[Asked]:
        prompt = self.config.judge_prompt
        texts = [filled(prompt, question=row["question"], path=row["path"]) for row in self.after[0].rows]
        return [Asked([{"role": "user", "content": text}]) for text in texts]

    def check(self) -> None:
        if self.config.judge is not None:
            self.config.judge.check()

    def plan(self) -> Planned:
        if self.config.judge is None:
            return Planned()
        if not self.after[0].is_current:
            most = len(problems_of(self.config.problems, self.config.limit)) * len(self.config.styles)
            return Planned(None, said=f"at most {most:,} calls")
        return self.planned(self.config.judge, self._asked())

    def make(self, work: Work) -> None:
        rows = self.after[0].rows
        if self.config.judge is None:
            found: list[bool | None] = [True] * len(rows)
        else:
            replies = self.ask(self.config.judge, self._asked(), work)
            failed = ["error" in reply for reply in replies]
            found = [False if bad else verdict(reply["text"]) for bad, reply in zip(failed, replies, strict=True)]
        for row, sound in zip(rows, found, strict=True):
            said = {True: "valid", False: "invalid", None: "doubtful"}[sound]
            work.count(f"{said}, {row['style']}")
            if sound or (sound is None and self.config.keep_doubtful):
                work.add(row)
        work.count("kept", len(work.done))
        if not work.done:
            raise ValueError(
                f"the judge keeps none of {len(rows):,} paths: {dict(Counter(map(str, found)))}. Look at its replies."
            )

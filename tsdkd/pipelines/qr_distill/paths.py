"""The stages that make reasoning paths and filter them (QR-Distill, 2.2 and 2.3). What is trained on is the filtered file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsdkd.pipelines.asking import OfRun, ask, planned
from tsdkd.pipelines.problems import problems_of
from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.grading import right, stated
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

    def planned(self, model: APIModel, asked: Callable[[], list[Asked]], each: int) -> Planned:
        """What that would be; where the stages before are not made yet, at most so many calls a question."""
        if not all(stage.is_current for stage in self.after):
            most = len(problems_of(self.config.problems, self.config.limit)) * each
            return Planned(None, said=f"at most {most:,} calls")
        return planned([model], {model.name: asked()}, self.replies)


class Paths(OfQR):
    """The teacher's path of each style to each question (2.2).

    Args:
        name: of the stage.
        styles: templates by name; None: the run's.
        questions: a stage whose rows they are; None: the run's problems.
        samples: paths of each style.
    """

    columns = PATH

    def __init__(
        self,
        config: QRConfig,
        name: str = "paths",
        styles: Mapping[str, str] | None = None,
        questions: Stage | None = None,
        samples: int = 1,
    ) -> None:
        self.styles, self.samples, self.questions = config.styles if styles is None else styles, samples, questions
        after = [] if questions is None else [questions]
        super().__init__(name, config, after, teacher=config.teacher.settings, styles=self.styles, ending=config.ending)
        if samples > 1:
            self.settings["samples"] = samples
        if questions is None:
            self.settings["limit"] = config.limit
            self.depends_on("problems", config.problems)

    def _asked(self) -> tuple[list[dict[str, Any]], list[Asked]]:
        """The paths' rows without the paths, and what is asked for them."""
        config, source = self.config, self.questions
        problems = problems_of(config.problems, config.limit, labelled=True) if source is None else source.rows
        rows, asked = [], []
        for problem in problems:
            for style, template in self.styles.items():
                text = filled(template, question=problem["question"]) + config.ending
                for sample in range(self.samples):
                    name = f"{problem['problem']}/{style}" + (f"/{sample}" if self.samples > 1 else "")
                    rows.append({**problem, "id": name, "style": style})
                    asked.append(Asked([{"role": "user", "content": text}], sample))
        return rows, asked

    def check(self) -> None:
        self.config.teacher.check()
        if self.questions is None:
            self._asked()

    def plan(self) -> Planned:
        return self.planned(self.config.teacher, lambda: self._asked()[1], len(self.styles) * self.samples)

    def make(self, work: Work) -> None:
        rows, asked = self._asked()
        for row, reply in zip(rows, self.ask(self.config.teacher, asked, work), strict=True):
            if "error" not in reply:
                work.add({**row, "path": reply["text"], "finish": reply["finish"]})
        work.count("paths", len(work.done))


class Correct(OfQR):
    """The paths whose final answer is the label (2.3, step 1), by the grader that scores students; of a question without a
    label those that state one."""

    columns = PATH

    def __init__(self, config: QRConfig, paths: Sequence[Stage]) -> None:
        super().__init__("correct", config, paths, answer=config.answer)
        if config.keep_wrong:
            self.settings["keep_wrong"] = True

    def make(self, work: Work) -> None:
        wrong: Counter[str] = Counter()
        pattern, rows = self.config.answer, [row for stage in self.after for row in stage.rows]
        for row in rows:
            label, style = row["label"], row["style"]
            if row.get("finish") == "length":
                wrong["cut"] += 1
            elif not row["path"].strip():
                wrong["empty"] += 1
            elif stated(row["path"], pattern) is not None if label is None else right(row["path"], label, pattern):
                work.add(row)
                work.count(f"{'stated' if label is None else 'right'}, {style}")
            elif self.config.keep_wrong:
                work.add(row)
                work.count(f"wrong and kept, {style}")
            else:
                wrong[f"{'no answer' if label is None else 'wrong'}, {style}"] += 1
        work.count("kept", len(work.done))
        work.counts.update(sorted(wrong.items()))
        if not work.done:
            first = next((row["path"] for row in rows), "")
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
        return self.planned(self.config.judge, self._asked, len(self.config.styles))

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

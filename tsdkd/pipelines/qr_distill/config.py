"""What a run of QR-Distill is told, from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tsdkd.checks import check_choice, check_count, check_share
from tsdkd.pipelines.qr_distill.options import QRTraining
from tsdkd.pipelines.qr_distill.prompts import (
    ANSWER,
    ANSWER_ALONE,
    ENDING,
    JUDGE,
    MARKS,
    REQUESTS,
    SINGLE,
    STYLES,
    check_template,
)
from tsdkd.pipelines.recipes import part_of, refuse_fields
from tsdkd.pipelines.students import Inference
from tsdkd.rollouts.api_models import APIModel
from tsdkd.teachers.sources import expanded

RECIPES = ("qr_distill", "sft", "skd", "step_by_step", "rephrase", "question_aug", "answer_aug", "backward")


@dataclass(frozen=True)
class QRConfig:
    """A run of QR-Distill.

    Args:
        recipe: `qr_distill`; `sft`, every right path to every student, each alone; or Table 1's: `skd`, `step_by_step`,
            `rephrase`, `question_aug`, `answer_aug`, `backward`, see `baselines`.
        students: the models that learn together, names or folders, at least two.
        test: a file of rows with `question` and `answer` that students are scored on; None: they are not.
        encoder: of the paths, a name or folder; any encoder or decoder of transformers.
        training, inference: see their classes.
        seed: of every draw.
        problems: a file of rows with `question` and `answer`.
        teacher: a model behind an API, which writes the paths.
        judge: another, which holds them sound or not; None keeps every right one.
        output_dir: where the stages write.
        styles: templates by name, with `{question}`; the paper's six.
        ending: what is added to each, so that a path states its answer.
        answer: what finds it, a regular expression.
        judge_prompt: with `{question}` and `{path}`.
        keep_doubtful: keep paths of which the judge says neither.
        keep_wrong: keep paths whose answer is not the label's (Table 2's "w/o QF", with `judge: null`).
        requests: templates of what the baselines ask besides paths: `rephrase`, `new_question`, `inverse`, `consistent`.
        answer_alone, marks: what `step_by_step` teaches as a label, with `{answer}`; what stands before a question to say which
            task it is (`label`, `rationale`, `inverse`).
        replies_dir: where replies are kept, so that runs share what was paid for; None: in `output_dir`.
        limit: the first so many problems; None: all.
        allow_failed: the share of requests that may fail without ending a stage.
    """

    students: tuple[str, ...]
    problems: str
    teacher: APIModel
    test: str | None = None
    encoder: str = "FacebookAI/roberta-base"
    training: QRTraining = field(default_factory=QRTraining)
    inference: Inference = field(default_factory=Inference)
    seed: int = 0
    judge: APIModel | None = None
    output_dir: str = "qr-distill"
    styles: Mapping[str, str] = field(default_factory=lambda: dict(STYLES))
    ending: str = ENDING
    answer: str = ANSWER
    judge_prompt: str = JUDGE
    keep_doubtful: bool = False
    keep_wrong: bool = False
    recipe: str = "qr_distill"
    requests: Mapping[str, str] = field(default_factory=lambda: dict(REQUESTS))
    answer_alone: str = ANSWER_ALONE
    marks: Mapping[str, str] = field(default_factory=lambda: dict(MARKS))
    replies_dir: str | None = None
    limit: int | None = None
    allow_failed: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> QRConfig:
        """From the mapping of a YAML file.

        Raises:
            ValueError: an unknown field, one that is missing, or a value that cannot work.
        """
        given = {str(name): value for name, value in given.items() if value is not None or name in ("judge", "test", "limit")}
        refuse_fields(cls, given, ("students", "problems", "teacher"))
        own = dict(given)
        for name in ("problems", "output_dir", "ending", "answer", "encoder", "test", "answer_alone", "replies_dir"):
            if own.get(name) is not None and not isinstance(own[name], str):
                raise ValueError(f"{name}={own[name]!r} must be a text.")
        own["teacher"] = APIModel.of(own["teacher"])
        for name, part in (("training", QRTraining), ("inference", Inference)):
            if name in own:
                own[name] = part_of(name, part, own[name])
        names = own["students"]
        if not isinstance(names, (list, tuple)) or len(names) < 2 or not all(isinstance(n, str) for n in names):
            raise ValueError(f"students={names!r}: QR-Distill trains at least two together; give a list of names or folders.")
        own["students"] = tuple(map(expanded, names))
        if not isinstance(own.get("seed", 0), int) or isinstance(own.get("seed", 0), bool):
            raise ValueError(f"seed={own['seed']!r} must be a whole number.")
        if own.get("judge") is not None:
            own["judge"] = APIModel.of(own["judge"])
        for name in ("output_dir", "replies_dir"):
            if name in own:
                own[name] = str(Path(own[name]).expanduser())
        for name, known in (("requests", REQUESTS), ("marks", MARKS)):
            if name in own:
                if not isinstance(own[name], Mapping) or not set(own[name]) <= set(known):
                    raise ValueError(f"{name} is a mapping with {', '.join(known)}, not {own[name]!r}.")
                own[name] = {**known, **own[name]}
        return cls(**own)

    def __post_init__(self) -> None:
        if not isinstance(self.styles, Mapping) or not self.styles:
            raise ValueError(f"styles is a mapping of names to templates, not {self.styles!r}.")
        for name, template in self.styles.items():
            if not isinstance(name, str):
                raise ValueError(f"a style is called {name!r}: its name must be a text.")
            check_template(f"styles.{name}", template, {"question"})
        check_template("judge_prompt", self.judge_prompt, {"question", "path"})
        try:
            re.compile(self.answer)
        except re.error as error:
            raise ValueError(f"answer={self.answer!r} is no regular expression: {error}.") from error
        for name, fields_ in (("rephrase", {"question"}), ("new_question", {"question"}), ("inverse", {"question", "answer"}),
                              ("consistent", {"question", "answer", "inverse", "path"})):  # fmt: skip
            check_template(f"requests.{name}", self.requests[name], fields_)
        check_template("answer_alone", self.answer_alone, {"answer"})
        for name in ("keep_doubtful", "keep_wrong"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        check_choice("recipe", self.recipe, RECIPES)
        if self.recipe not in ("qr_distill", "sft") and SINGLE not in self.styles:
            raise ValueError(
                f"recipe: {self.recipe} asks for the style {SINGLE}, which styles lacks: {', '.join(self.styles)}."
            )
        rates = len(self.training.learning_rates)
        if rates != len(self.students):
            raise ValueError(f"{len(self.students)} students have {rates} learning rates (training: learning_rates): one each.")
        if self.judge is not None and self.judge.name == self.teacher.name:
            raise ValueError(f"teacher and judge are both called {self.teacher.name}: give each a name of its own.")
        if self.limit is not None:
            check_count("limit", self.limit)
        check_share("allow_failed", self.allow_failed)

    @property
    def taught(self) -> QRTraining:
        """How students are trained: a baseline's are taught everything, each alone."""
        return self.training if self.recipe == "qr_distill" else replace(self.training, routing="all", mutual_weight=0.0)

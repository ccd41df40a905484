"""What a run of QR-Distill is told, from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdkd.checks import check_count, check_share
from tsdkd.pipelines.qr_distill.prompts import ANSWER, ENDING, JUDGE, STYLES, check_template
from tsdkd.pipelines.qr_distill.trainer import QRTraining
from tsdkd.pipelines.recipes import part_of, refuse_fields
from tsdkd.pipelines.students import Inference
from tsdkd.rollouts.api_models import APIModel
from tsdkd.teachers.sources import expanded


@dataclass(frozen=True)
class QRConfig:
    """A run of QR-Distill.

    Args:
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
        for name in ("problems", "output_dir", "ending", "answer", "encoder", "test"):
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
        if "output_dir" in own:
            own["output_dir"] = str(Path(own["output_dir"]).expanduser())
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
        if not isinstance(self.keep_doubtful, bool):
            raise ValueError(f"keep_doubtful={self.keep_doubtful!r} must be true or false.")
        rates = len(self.training.learning_rates)
        if rates != len(self.students):
            raise ValueError(f"{len(self.students)} students have {rates} learning rates (training: learning_rates): one each.")
        if self.judge is not None and self.judge.name == self.teacher.name:
            raise ValueError(f"teacher and judge are both called {self.teacher.name}: give each a name of its own.")
        if self.limit is not None:
            check_count("limit", self.limit)
        check_share("allow_failed", self.allow_failed)

"""What a run of TwT is told, from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdkd.checks import check_choice, check_count, check_share
from tsdkd.pipelines.recipes import part_of, refuse_fields
from tsdkd.pipelines.students import Inference
from tsdkd.pipelines.twt.prompts import Task, task_of
from tsdkd.pipelines.twt.sampling import DIVERSITY, QUALITY, VOICES
from tsdkd.pipelines.twt.training import Training
from tsdkd.rollouts.api_models import APIModel
from tsdkd.teachers.sources import expanded

RECIPES = ("twt", "standard_kd", "step_by_step", "tinyllm")
COMPRESSION = ("teacher", "fixed_length", "compressor", "none")


@dataclass(frozen=True)
class Sampling:
    """Dual-criteria rejection sampling, with the paper's values.

    Args:
        samples: replies of each teacher to each question.
        quality, threshold: which triplets are kept, see `sampling.quality`.
        diversity, voices: which of a question's, see `sampling.diverse`.
        embedding_model: of sentence-transformers, a name or a folder.
        allow_failed: the share of requests that may fail, after every try, without ending the stage.
    """

    samples: int = 1
    quality: str = "confidence"
    threshold: float = 0.95
    diversity: str = "embedding"
    voices: str = "teachers"
    embedding_model: str = "sentence-transformers/all-mpnet-base-v2"
    allow_failed: float = 0.0

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_choice("quality", self.quality, QUALITY)
        check_choice("diversity", self.diversity, DIVERSITY)
        check_choice("voices", self.voices, VOICES)
        check_share("threshold", self.threshold)
        check_share("allow_failed", self.allow_failed)


@dataclass(frozen=True)
class Compression:
    """How rationales become shorter before the second stage.

    Args:
        by: `teacher`, the paper's: whoever wrote a rationale rewrites it, seeing the student's. `fixed_length`: its first
            `share` of words. `compressor`: LLMLingua-2 keeps that share of its tokens. `none`: there is no such stage.
        rounds: of compressing and training; the paper's Table 3 has two.
        share: of words or tokens that are kept.
        compressor_model: of LLMLingua-2.
    """

    by: str = "teacher"
    rounds: int = 1
    share: float = 0.5
    compressor_model: str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"

    def __post_init__(self) -> None:
        check_choice("by", self.by, COMPRESSION)
        check_count("rounds", self.rounds)
        check_share("share", self.share)
        if self.by in ("fixed_length", "compressor") and not self.share:
            raise ValueError("compression: share: 0 keeps nothing; give the share of a rationale that stays.")


@dataclass(frozen=True)
class TwTConfig:
    """A run of TwT.

    Args:
        student: the model that learns, a name or a folder.
        problems: a file of rows with `question` and, where there are labels, `answer`.
        teachers: models behind an API; of `step_by_step` and `standard_kd` the first alone is asked.
        output_dir: where the stages write.
        replies_dir: where replies are kept, so that runs share what was paid for; None: in `output_dir`.
        test: a file of rows with `question` and `answer` that students are scored on; None: they are not.
        task: `maths`, `choice`, `code`, or a mapping of templates, see `prompts.Task`.
        recipe: `twt`; or what the paper compares it with: `standard_kd` (the teacher's labels alone), `step_by_step`
            (Distilling Step-by-Step: label and rationale as two tasks), `tinyllm` (the same with every teacher's rationales).
        rationale_weight: of the rationale's task in the loss of those two, beside 1 of the label's.
        limit: the first so many problems; None: all.
        seed: of draws and training.
        sampling, compression, training, inference: see their classes.
    """

    student: str
    problems: str
    teachers: tuple[APIModel, ...]
    output_dir: str = "twt"
    replies_dir: str | None = None
    test: str | None = None
    task: Task = field(default_factory=lambda: task_of("maths"))
    recipe: str = "twt"
    rationale_weight: float = 1.0
    limit: int | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    compression: Compression = field(default_factory=Compression)
    training: Training = field(default_factory=Training)
    inference: Inference = field(default_factory=Inference)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TwTConfig:
        """From the mapping of a YAML file.

        Raises:
            ValueError: an unknown field, one that is missing, or a value that cannot work.
        """
        refuse_fields(cls, given, ("student", "problems", "teachers"))
        own = dict(given)
        for name, kind in (
            ("student", str),
            ("problems", str),
            ("test", str),
            ("output_dir", str),
            ("replies_dir", str),
            ("seed", int),
        ):
            if own.get(name) is not None and (not isinstance(own[name], kind) or isinstance(own[name], bool)):
                raise ValueError(f"{name}={own[name]!r} must be a {'text' if kind is str else 'whole number'}.")
        if own.get("output_dir", "twt") is None:
            raise ValueError("output_dir is empty: name a folder.")
        weight = own.get("rationale_weight", 1.0)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
            raise ValueError(f"rationale_weight={weight!r} must be a number of 0 or above.")
        for name in ("output_dir", "replies_dir"):
            if own.get(name) is not None:
                own[name] = str(Path(own[name]).expanduser())
        own["student"] = expanded(own["student"])
        if own.get("recipe", "twt") in RECIPES[1:]:
            chosen = [name for name in ("quality", "threshold", "diversity", "voices") if name in (own.get("sampling") or {})]
            chosen += ["compression"] if "compression" in own else []
            if chosen:
                raise ValueError(f"recipe: {own['recipe']} neither selects nor compresses: leave out {', '.join(chosen)}.")
        parts = {"sampling": Sampling, "compression": Compression, "training": Training, "inference": Inference}
        for name, part in parts.items():
            if name in own:
                own[name] = part_of(name, part, own[name])
        if not isinstance(own["teachers"], (list, tuple)):
            raise ValueError("teachers is a list, each with name, base_url and model.")
        own["teachers"] = tuple(APIModel.of(teacher) for teacher in own["teachers"])
        own["task"] = task_of(own.get("task", "maths"))
        return cls(**own)

    def __post_init__(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two teachers are called {', '.join(twice)}: give each a name of its own.")
        check_choice("recipe", self.recipe, RECIPES)
        if self.limit is not None:
            check_count("limit", self.limit)
        if self.sampling.quality == "log_probability" and not all(teacher.log_probs for teacher in self.asked):
            silent = ", ".join(teacher.name for teacher in self.asked if not teacher.log_probs)
            raise ValueError(f"quality: log_probability needs log_probs: true of every teacher; {silent} have it not.")

    @property
    def asked(self) -> tuple[APIModel, ...]:
        """The teachers that are asked."""
        return self.teachers[:1] if self.recipe in ("standard_kd", "step_by_step") else self.teachers

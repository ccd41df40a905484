"""A run as it was asked for, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tsdkd.data.files import as_data_set
from tsdkd.data.prompts import are_chats, has_images
from tsdkd.data.teacher_prompts import has_teacher_prompts, with_teacher_prompts
from tsdkd.methods import TSDKD, Method, resolve_method
from tsdkd.teachers import Recording
from tsdkd.teachers.heads import reads_images
from tsdkd.teachers.itself import SELF
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.host import eval_sets
from tsdkd.trainers.sources import config_of
from tsdkd.trainers.teacher_entries import TeacherEntry, entries_of
from tsdkd.trainers.tsd_kd_config import TSDKDConfig
from tsdkd.types import RolloutSpec


@dataclass(frozen=True)
class Setup:
    """A run as it was asked for.

    Args:
        args, method: the options and the method.
        student, teacher: a name, a path or a model each; no teacher is None, several are `{name: TeacherEntry}`.
        recording: an opened recording, in place of a teacher and of prompts.
        train_dataset, eval_dataset, pretraining_dataset: rows.
        has_tools: whether tools were given.
        quantization: how the student is quantized as it is loaded.
    """

    args: TokenDistillConfig
    method: Method
    student: Any
    teacher: Any = None
    recording: Recording | None = None
    train_dataset: Any = None
    eval_dataset: Any = None
    pretraining_dataset: Any = None
    has_tools: bool = False
    quantization: Any = None

    @classmethod
    def of(
        cls, args: TokenDistillConfig, method: Method, student: Any, teacher: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, pretraining_dataset: Any = None, **more: Any,
    ) -> Setup:  # fmt: skip
        """As a trainer's caller asks for it: paths as names, the options' teacher and recording, rows as data sets.

        Raises:
            ValueError: a recording that cannot be opened, or rows that are no data set.
        """
        teacher = args.teachers or args.teacher_model_name_or_path if teacher is None else teacher
        student, teacher = (str(m) if isinstance(m, os.PathLike) else m for m in (student, teacher))
        teacher = entries_of(teacher, args) if isinstance(teacher, Mapping) else teacher
        recording = Recording.open(args.recording) if args.recording is not None else None
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "pretraining_dataset": pretraining_dataset}
        sets = {role: as_data_set(rows, role) for role, rows in given.items()}
        for role in ("train_dataset", "eval_dataset"):
            sets[role] = with_teacher_prompts(sets[role], args.teacher_prompt_template, role)
        return cls(args, method, student, teacher, recording, **sets, **more)

    @property
    def rollouts(self) -> RolloutSpec:
        """Whose completions are trained on; a recording's are given."""
        spec = self.method.rollouts
        return spec if self.recording is None else dataclasses.replace(spec, writer="student", share=0.0, replay=None)

    @property
    def uses_vllm(self) -> bool:
        return self.args.use_vllm or self.args.teacher_answers_engine == "vllm"

    @property
    def teacher_can_write(self) -> bool:
        """Whether a teacher can write completions: one in this process, or a checkpoint for a vLLM engine of its own."""
        placed = self.args.teacher_placement == "local" or self.args.teacher_answers_engine == "vllm"
        return self.teacher is not None and placed and not self.teaches_itself and not self.several

    @property
    def several(self) -> Mapping[str, TeacherEntry]:
        """The teachers by name, where there are several."""
        return self.teacher if isinstance(self.teacher, Mapping) else {}

    @property
    def apart(self) -> dict[str | None, Setup]:
        """Each teacher's setup as if it were alone."""
        if not self.several:
            return {None: self}
        return {
            name: dataclasses.replace(self, args=one.args_of(self.args), teacher=one.model)
            for name, one in self.several.items()
        }

    @property
    def swaps(self) -> bool:
        """Whether a teacher takes the student's place on the device while it reads."""
        return any(part.args.teacher_placement == "swap" for part in self.apart.values())

    @property
    def teaches_itself(self) -> bool:
        """Whether the student is its own teacher."""
        return isinstance(self.teacher, str) and self.teacher == SELF

    @property
    def sets(self) -> dict[str, Any]:
        """The data sets that have prompts, by the role that messages name."""
        named = {"train_dataset": self.train_dataset, **eval_sets(self.eval_dataset)}
        return {role: rows for role, rows in named.items() if rows is not None}

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads prompts of its own."""
        return any(map(has_teacher_prompts, self.sets.values()))

    @property
    def has_chats(self) -> bool:
        """Whether any prompts are chats."""
        return any(map(are_chats, self.sets.values()))

    @functools.cached_property
    def with_images(self) -> list[str]:
        """The data sets whose prompts have images, by their roles."""
        return [role for role, rows in self.sets.items() if has_images(rows)]

    @property
    def sees(self) -> bool:
        """Whether prompts have images, and the student reads them."""
        return bool(self.with_images) and reads_images(self.student_config)

    @functools.cached_property
    def student_config(self) -> Any:
        """The student's configuration, read where it is not loaded yet."""
        return self._config(self.student, "student")

    @functools.cached_property
    def teacher_config(self) -> Any:
        """The teacher's, likewise; None without one."""
        if self.teaches_itself:
            return self.student_config
        return self._config(self.teacher, "teacher")

    def _config(self, model: Any, role: str) -> Any:
        return config_of(model, role, self.args) if isinstance(model, str) else getattr(model, "config", None)


def chosen_method(args: TokenDistillConfig, method: str | Method | None) -> Method:
    """The config's method, or the one given beside it.

    Raises:
        ValueError: options that would be lost.
    """
    if method is None:
        return args.build_method()
    if isinstance(args, TSDKDConfig):
        given = resolve_method(method)
        if not isinstance(given, TSDKD):
            raise ValueError(
                f"method={given.name!r} was given with a TSDKDConfig, whose options are TSD-KD's: use "
                "TokenDistillTrainer with a TokenDistillConfig."
            )
        if args.build_method() != TSDKD():
            raise ValueError("TSD-KD's options were given twice, on the method and in TSDKDConfig: set them on one.")
        return given
    return resolve_method(method, args.options_by_name())

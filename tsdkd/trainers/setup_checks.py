"""What is checked before anything is loaded: functions over one frozen `Setup`, each yielding `Problem`s.

The trainer raises the first; whoever wants all iterates over `problems(setup)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from tsdkd.checks import Problem
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.setup_data import (
    completions_are_there,
    corpus_has_a_weight,
    prompts_can_be_read,
    rows_name_their_teacher,
    self_teaches_something,
    teachers_prompts_are_there,
)
from tsdkd.trainers.setup_models import (
    models_write_text,
    options_have_effect,
    outputs_can_be_written,
    sampling_is_possible,
    teacher_is_there,
)
from tsdkd.trainers.setup_placing import (
    placement_is_possible,
    prefixes_are_the_students,
    rollouts_go_ahead,
    swap_is_possible,
    vllm_works,
)
from tsdkd.trainers.vision import images_can_be_read


def recording_goes_alone(setup: Setup) -> Iterator[Problem]:
    """A recording brings its prompts and its teacher, and its completions stand."""
    if setup.recording is None:
        return
    if setup.method.rollouts.writer != "student":
        yield Problem(
            f"{setup.method.name} has its completions written by student and teacher together, and a recording holds "
            "completions that stand",
            do="train it with the teacher itself (leave recording out)",
        )
    spec = setup.method.rollouts
    of_student = setup.recording.about.get("completions", "student") == "student"
    if of_student and spec.need_dataset and spec.teacher_may_write and not spec.share:
        yield Problem(
            f"{setup.method.name} trains on completions of the teacher or of a data set, and the recording's are the student's",
            "the student would imitate itself",
            "train it with the teacher itself (leave recording out), or another method on the recording",
        )
    if setup.eval_dataset is not None:
        yield Problem(
            "a recorded teacher knows its own rows alone and cannot read an eval_dataset", do="leave eval_dataset out"
        )
    if setup.teacher is not None or setup.train_dataset is not None:
        yield Problem(
            "a recording brings its prompts and its teacher's hidden states",
            do="leave train_dataset and the teacher out, or leave recording out",
        )


def packages_are_there(setup: Setup) -> Iterator[Problem]:
    """What the logs go to, and what the student is quantized with."""
    installed = {*get_available_reporting_integrations(), "flyte"}  # flyte is there where it runs
    for name in setup.args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            yield Problem(f"report_to={name} is unknown{meant}", do=f"pass one of: none, {known}")
        elif name not in installed:
            yield Problem(
                f"report_to={name} was asked for, and its package is not installed", do=f"pip install {name}, or leave it out"
            )
    options = setup.args.model_init_kwargs or {}
    quantized = setup.quantization or options.get("quantization_config")
    if quantized is not None and "BitsAndBytes" in type(quantized).__name__ and find_spec("bitsandbytes") is None:
        yield Problem(
            "a student of 4-bit or 8-bit weights was asked for, and bitsandbytes is not installed",
            do="pip install 'tsdkd[qlora]', or leave it out",
        )


CHECKS: list[Callable[[Setup], Iterator[Problem]]] = [
    packages_are_there,
    recording_goes_alone,
    teacher_is_there,
    options_have_effect,
    sampling_is_possible,
    outputs_can_be_written,
    vllm_works,
    rollouts_go_ahead,
    prefixes_are_the_students,
    placement_is_possible,
    swap_is_possible,
    corpus_has_a_weight,
    prompts_can_be_read,
    teachers_prompts_are_there,
    self_teaches_something,
    rows_name_their_teacher,
    images_can_be_read,
    completions_are_there,
    models_write_text,  # it reads files, or asks the Hub
]
# Of data that come later, to `evaluate`.
OF_DATA: list[Callable[[Setup], Iterator[Problem]]] = [
    prompts_can_be_read,
    teachers_prompts_are_there,
    rows_name_their_teacher,
    images_can_be_read,
    completions_are_there,
]
# Of several teachers each one's.
OF_TEACHER = (teacher_is_there, options_have_effect, placement_is_possible, models_write_text)


def problems(setup: Setup, checks: list[Callable[[Setup], Iterator[Problem]]] = CHECKS) -> Iterator[Problem]:
    """Everything that keeps a set-up from running, as far as it can be known before anything is loaded."""
    for check in checks:
        for part in setup.apart.values() if check in OF_TEACHER else (setup,):
            yield from check(part)

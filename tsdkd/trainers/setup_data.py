"""What of a run's data keeps it from being trained."""

from __future__ import annotations

from collections.abc import Iterator

from tsdkd.checks import Problem
from tsdkd.data.prompts import columns_of, prompt_problems
from tsdkd.data.teacher_prompts import has_teacher_prompts, teacher_prompt_problems
from tsdkd.teachers.itself import SELF
from tsdkd.trainers.host import batch_rows, eval_sets, has_completions
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.teacher_entries import teacher_problems, weight_problems


def corpus_has_a_weight(setup: Setup) -> Iterator[Problem]:
    """A corpus and the weight of its loss go together."""
    weight, rows = setup.method.pretraining_weight, setup.pretraining_dataset
    if not weight and rows is not None:
        yield Problem(
            f"pretraining_dataset was given to {setup.method.name}, whose pretraining_weight is 0",
            "nothing would be trained on it",
            "set minillm's pretraining_weight, or leave the data set out",
        )
    if rows is not None and not hasattr(rows, "__len__"):
        yield Problem(
            "pretraining_dataset is a stream",
            "its texts are drawn at random, by number",
            "pass rows, e.g. the first of it: datasets.Dataset.from_list(list(stream.take(10000)))",
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
        yield from prompt_problems(setup.train_dataset, "train_dataset", needed, batch, setup.sees)
    for role, rows in eval_sets(setup.eval_dataset).items():
        if rows is not None:
            yield from prompt_problems(rows, role, sees=setup.sees)


def teachers_prompts_are_there(setup: Setup) -> Iterator[Problem]:
    """Prompts of the teacher's own in all rows, or in none; no option of theirs without them."""
    args, itself = setup.args, setup.teaches_itself
    if setup.train_dataset is not None and not setup.has_teacher_prompts and args.teacher_chat_template_kwargs:
        yield Problem(
            "teacher_chat_template_kwargs were given, and the data set has no teacher_prompt",
            "the teacher reads the student's own ids",
            "give rows a column teacher_prompt (or teacher_prompt_template='{prompt}'), or use chat_template_kwargs",
        )
    read = {"self_teacher"} if itself else set()
    read |= {"ema_decay"} if itself and args.self_teacher == "ema" else set()
    changed = [name for name, unset in (("self_teacher", "start"), ("ema_decay", 0.999)) if getattr(args, name) != unset]
    unused = [name for name in changed if name not in read]
    if unused:
        yield Problem(f"{' and '.join(unused)} has no effect on this teacher", do="leave it out, or pass teacher_model='self'")
    given = setup.sets
    have = {role for role, rows in given.items() if has_teacher_prompts(rows)}
    if have and have != set(given):
        yield Problem(
            f"{', '.join(sorted(have))} has a column teacher_prompt, and {', '.join(sorted(set(given) - have))} has none",
            "their losses would be of two tasks",
            "give it to both, or leave it out",
        )
    for role, rows in given.items():
        yield from teacher_prompt_problems(rows, role)


def rows_name_their_teacher(setup: Setup) -> Iterator[Problem]:
    """With several teachers each row has one that is there."""
    args, names = setup.args, list(setup.several)
    if args.teacher_weights is not None:
        yield from weight_problems(args.teacher_weights, names, {role: columns_of(rows) for role, rows in setup.sets.items()})
        if args.default_teacher is not None:
            yield Problem("default_teacher has no effect beside teacher_weights", do="leave it out")
        return
    if not names:
        if args.default_teacher is not None:
            yield Problem(f"default_teacher={args.default_teacher!r}, and there is one teacher", do="leave it out")
        return
    if args.default_teacher is not None and args.default_teacher not in names:
        yield Problem(f"default_teacher={args.default_teacher!r}, and there are {', '.join(names)}", do="name one of them")
    for role, rows in setup.sets.items():
        yield from teacher_problems(rows, role, names, args.default_teacher)


def self_teaches_something(setup: Setup) -> Iterator[Problem]:
    """A student that teaches itself reads something else as a teacher, and is whole in each process."""
    if not setup.teaches_itself:
        return
    args = setup.args
    if setup.train_dataset is not None and not setup.has_teacher_prompts:
        yield Problem(
            f"the teacher is {SELF!r}, and the data set has no teacher_prompt",
            "student and teacher would read the same, and the loss would be 0",
            "give rows a column teacher_prompt, or pass teacher_prompt_template",
        )
    if args.teacher_placement != "local":
        yield Problem(
            f"the teacher is {SELF!r}, and teacher_placement={args.teacher_placement}",
            "the student's own weights are read, in this process",
            "leave teacher_placement out",
        )
    sharded = getattr(args.deepspeed_plugin, "zero_stage", 0) == 3 or bool(args.fsdp)
    if sharded and args.self_teacher != "live":
        yield Problem(
            f"the teacher is {SELF!r} ({args.self_teacher}), and the student is sharded (ZeRO-3 or FSDP)",
            "a second copy of its weights stands in their place while it reads, and a share has no place for it",
            "pass self_teacher=live, or shard no more than the optimizer (ZeRO-2)",
        )


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
        may_write = spec.teacher_may_write or setup.args.teacher_writes_missing
        if not columns or has_completions(columns) or (may_write and setup.teacher_can_write):
            continue
        if may_write:
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
                "rename the one that holds them to 'completion', let the teacher write them (teacher_writes_missing), or use "
                "a method that trains on the student's own",
            )

"""TwT as stages in their order, of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tsdkd.pipelines.pipeline import Pipeline
from tsdkd.pipelines.stage import Stage
from tsdkd.pipelines.tested import Scores
from tsdkd.pipelines.twt.config import TwTConfig
from tsdkd.pipelines.twt.habits import Answers, Compressed, Student, tested
from tsdkd.pipelines.twt.labelling import Diversity, Labels, Quality, Triplets


def stages(config: TwTConfig) -> list[Stage]:
    """The stages of a run, each after those that it reads.

    `twt` trains on [x; r; y], then, once a round, on [x; rT; y] with shorter rationales, then on [x; y]; `standard_kd` on
    [x; y] alone; `step_by_step` and `tinyllm` on both as tasks beside each other, of one teacher or of all.
    """
    labels = Labels(config)
    triplets = Triplets(config, labels)
    made: list[Stage] = [labels, triplets]
    if config.recipe != "twt":  # neither selects: every triplet teaches
        form = "answer" if config.recipe == "standard_kd" else "tasks"
        students: list[Stage] = [Student("student-1", config, triplets, form, None)]
        made += students
    else:
        kept = Quality(config, triplets)
        rows: Stage = Diversity(config, kept)
        student = Student("student-1", config, rows, "whole", None)
        made += [kept, rows, student]
        students = [student]
        if config.compression.by != "none":
            for number in range(1, config.compression.rounds + 1):
                answers = Answers(f"answers-{number}", config, rows, student) if config.compression.by == "teacher" else None
                rows = Compressed(f"shorter-{number}", config, rows, answers)
                student = Student(f"student-{number + 1}", config, rows, "whole", student)
                made += [*([answers] if answers is not None else []), rows, student]
                students.append(student)
        last = Student(f"student-{len(students) + 1}", config, rows, "answer", student)
        made.append(last)
        students.append(last)
    if config.test is not None:
        answered = tested(config, students)
        made += [answered, Scores(answered, config.task.name, config.seed, recipe=config.recipe, **config.training.settings)]
    return made


def pipeline(config: TwTConfig, say: Callable[[str], None] = print) -> Pipeline:
    """The pipeline of a configuration."""
    return Pipeline("twt", stages(config), Path(config.output_dir), say)

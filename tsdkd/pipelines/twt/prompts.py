"""What teachers are asked (the paper's Figures 4 and 8), and what students read and write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tsdkd.pipelines.templates import fields_of, filled

_FOLDER = Path(__file__).parent / "templates"  # Figures 4 and 8, each of their paragraphs and items a line
_FIGURE = {name: (_FOLDER / f"{name}.txt").read_text().rstrip("\n") for name in ("maths", "choice", "code", "rewrite")}
REWRITE = _FIGURE["rewrite"]
_REWRITE_FIELDS = """

Task:
{question}

Your previous thinking process:
{rationale}

The student's thinking process:
{student}

Give the revised thinking process alone, in the format:
Thinking: [your revised thinking process]"""


@dataclass(frozen=True)
class Task:
    """What is asked of teachers and students, and how their texts are read.

    Args:
        name: of the task.
        ask: the teacher's instructions; the question follows them.
        rewrite: the teacher's prompt of the compression, with `{question}`, `{rationale}` and `{student}`.
        factors: the weights of Eq. 1 by the factors' names.
        student: the student's prompt, with `{question}`.
        completion: what it is trained to write, with `{rationale}` and `{answer}`.
        answer_only: the same without a rationale, with `{answer}`.
        answer: what finds a final answer in a completion, a regular expression; None: `#### …` or a box.
        is_code: the answer is a block of code.

    Raises:
        ValueError: a template that lacks a field, or has one that there is not.
    """

    name: str
    ask: str
    rewrite: str = REWRITE + _REWRITE_FIELDS
    factors: Mapping[str, float] = field(default_factory=dict)
    student: str = "{question}"
    completion: str = "{rationale}\n#### {answer}"
    answer_only: str = "#### {answer}"
    answer: str | None = None
    is_code: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "ask", "rewrite", "student", "completion", "answer_only"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"a task's {name} must be a text, not {getattr(self, name)!r}.")
        numbers = isinstance(self.factors, Mapping) and all(isinstance(value, (int, float)) for value in self.factors.values())
        if not numbers:
            raise ValueError(f"the factors of the task {self.name} are a mapping of names to weights, not {self.factors!r}.")
        if self.answer is not None and not isinstance(self.answer, str):
            raise ValueError(f"answer={self.answer!r} of the task {self.name} must be a regular expression.")
        wanted = {
            "rewrite": {"question", "rationale", "student"}, "student": {"question"}, "completion": {"rationale", "answer"},
            "answer_only": {"answer"},
        }  # fmt: skip
        for name, needed in wanted.items():
            found = fields_of(getattr(self, name))
            if found != needed:
                lacks, has = sorted(needed - found), sorted(found - needed)
                what = f"lacks {', '.join(f'{{{n}}}' for n in lacks)}" if lacks else f"has {', '.join(f'{{{n}}}' for n in has)}"
                raise ValueError(f"the template {name} of the task {self.name} {what}; its fields are {sorted(needed)}.")
        if self.factors and abs(sum(self.factors.values()) - 1) > 1e-6:
            raise ValueError(
                f"the factors of the task {self.name} weigh {sum(self.factors.values()):g} together, not 1 (Eq. 1)."
            )
        if self.answer is not None:
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(
                    f"answer={self.answer!r} of the task {self.name} is no regular expression: {error}."
                ) from error

    def filled(self, template: str, **values: str) -> str:
        """One of its templates with its fields; braces in the values stay."""
        return filled(getattr(self, template), **values)

    def messages(self, question: str) -> list[dict[str, str]]:
        """What a teacher is asked about a question."""
        return [{"role": "system", "content": self.ask}, {"role": "user", "content": question}]


TASKS = {
    "maths": Task(
        "maths", _FIGURE["maths"], factors={"correctness": 0.5, "logical reasoning": 0.25, "clarity": 0.15, "completeness": 0.1}
    ),
    "choice": Task(
        "choice",
        _FIGURE["choice"],
        factors={"correctness": 0.5, "logical reasoning": 0.25, "clarity": 0.15, "completeness": 0.1},
        completion="{rationale}\nThe answer is: {answer}",
        answer_only="The answer is: {answer}",
        answer=r"(?i)the answer is:?[ \t]*\(?([^\n.)]+)",
    ),
    "code": Task(
        "code",
        _FIGURE["code"],
        factors={"correctness": 0.5, "readability": 0.2, "execution efficiency": 0.2, "test coverage": 0.1},
        completion="{rationale}\n```python\n{answer}\n```",
        answer_only="```python\n{answer}\n```",
        answer=r"(?s)```(?:python)?\n(.*?)```",
        is_code=True,
    ),
}


def task_of(given: Any) -> Task:
    """A task by its name, or a mapping with `base` and fields of one's own in place of its.

    Raises:
        ValueError: an unknown name or field.
    """
    if isinstance(given, Task):
        return given
    own = dict(given) if isinstance(given, Mapping) else {"base": given}
    base = own.pop("base", "maths")
    if not isinstance(base, str) or base not in TASKS:
        raise ValueError(
            f"task {base!r} is unknown; choose {', '.join(TASKS)}, or give a mapping with base and your templates."
        )
    known = {member.name for member in fields(Task)}
    unknown = sorted(set(own) - known)
    if unknown:
        raise ValueError(f"a task has no field {', '.join(unknown)}; there are: {', '.join(sorted(known))}.")
    made = {member.name: getattr(TASKS[base], member.name) for member in fields(Task)}
    return Task(**{**made, **own})

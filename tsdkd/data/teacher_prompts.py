"""What a teacher reads in place of a row's prompt: a column of its own, or one that a template makes of the row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tsdkd.checks import Problem
from tsdkd.data.prompts import columns_of, kind_of, rows_named
from tsdkd.data.templates import fields_of, filled

COLUMN, IDS = "teacher_prompt", "teacher_prompt_ids"
PROMPT = "prompt"  # the field of a template that the row's own prompt fills


def has_teacher_prompts(dataset: Any) -> bool:
    """Whether a data set has a column that the teacher reads in place of `prompt`."""
    return dataset is not None and bool({COLUMN, IDS} & set(columns_of(dataset)))


def check_template(template: object) -> None:
    """Refuse what is no template of a teacher's prompt.

    Raises:
        ValueError: it is no text, or has no fields.
    """
    if not isinstance(template, str) or not fields_of(template) - {""}:
        raise ValueError(
            f"teacher_prompt_template={template!r} must be a text with columns in braces, e.g. '{{prompt}} A worked solution: "
            "{solution}'."
        )


def made_by(template: str, row: Mapping[str, Any]) -> Any:
    """A row's prompt for the teacher: of a text the template with the row's columns; of a chat the same in its last turn.

    Raises:
        ValueError: a column that is empty, or no text.

    Example:
        >>> made_by("{prompt} Hint: {hint}", {"prompt": "1+1?", "hint": "count"})
        '1+1? Hint: count'
        >>> made_by("{prompt}!", {"prompt": [{"role": "user", "content": "Hi"}]})
        [{'role': 'user', 'content': 'Hi!'}]
    """
    prompt = row[PROMPT]
    own = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    values = {name: own if name == PROMPT else row[name] for name in fields_of(template)}
    lacking = [name for name, value in values.items() if value is None or value == ""]
    if lacking:
        raise ValueError(f"its {', '.join(lacking)} is empty")
    text = filled(template, **{name: str(value) for name, value in values.items()})
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def with_teacher_prompts(dataset: Any, template: str | None, role: str) -> Any:
    """A data set with the column `teacher_prompt` that a template makes; without one as it is.

    Raises:
        ValueError: a column that is not there, one that is empty in some rows (which), or both a template and a column.
    """
    if template is None or dataset is None:
        return dataset
    if isinstance(dataset, dict):
        return {name: with_teacher_prompts(rows, template, f"{role}[{name!r}]") for name, rows in dataset.items()}
    columns = columns_of(dataset)
    missing = sorted(fields_of(template) - set(columns))
    if missing:
        raise ValueError(
            f"teacher_prompt_template names {', '.join(missing)}, which {role} does not have; it has: {', '.join(columns)}."
        )
    if COLUMN in columns or IDS in columns:
        raise ValueError(f"{role} has a column {COLUMN}, and teacher_prompt_template would make one: leave one of them out.")
    if not hasattr(dataset, "__len__"):
        return dataset.map(lambda row: {**row, COLUMN: made_by(template, row)})
    made, wrong = [], []
    for number, row in enumerate(dataset):
        try:
            made.append(made_by(template, row))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            wrong.append((number, str(error)))
    if wrong:
        raise ValueError(
            f"teacher_prompt_template cannot be filled in {rows_named([n for n, _ in wrong])} of {role}: {wrong[0][1]}. Fill "
            "or drop them."
        )
    return dataset.add_column(COLUMN, made)


def teacher_prompt_problems(dataset: Any, role: str) -> Iterator[Problem]:
    """Rows whose prompt for the teacher is missing, empty or of another kind than the others'."""
    if not hasattr(dataset, "__len__") or COLUMN not in columns_of(dataset):
        return
    kinds: dict[str, list[int]] = {}
    for number, prompt in enumerate(dataset[COLUMN]):
        kinds.setdefault(kind_of(prompt), []).append(number)
    for kind, rows in kinds.items():
        if kind not in ("text", "chat"):
            yield Problem(
                f"{role} has no {COLUMN} in {rows_named(rows)} ({len(rows)} of {len(dataset)} are {kind})",
                "the teacher reads it in place of the prompt",
                "give each row one, a text or a list of chat messages, or drop the row",
            )
    if {"text", "chat"} <= kinds.keys():
        yield Problem(
            f"{role} mixes texts and chats in {COLUMN} ({rows_named(kinds['chat'])} are chats)", do="make them one type"
        )

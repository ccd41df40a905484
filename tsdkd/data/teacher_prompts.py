"""What a teacher reads in place of a row's prompt: a column of its own, or one that a template makes of the row."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping
from typing import Any

from tsdkd.checks import Problem
from tsdkd.data.completions import joined_parts
from tsdkd.data.prompts import columns_of, kind_of, rows_named

COLUMN, IDS = "teacher_prompt", "teacher_prompt_ids"
PROMPT = "prompt"  # the field of a template that the row's own prompt fills
_UNFILLED = (ValueError, TypeError, AttributeError, KeyError, IndexError)  # of a row that a template does not fit


def has_teacher_prompts(dataset: Any) -> bool:
    """Whether a data set has a column that the teacher reads in place of `prompt`."""
    return dataset is not None and bool({COLUMN, IDS} & set(columns_of(dataset)))


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """A template's texts, each with the column behind it, as `str.format` reads them: `{{` and `}}` are braces.

    Raises:
        ValueError: a brace without its other, or a field with more than a column's name.
    """
    made = []
    for text, name, form, conversion in string.Formatter().parse(template):
        if name is not None and (not name or form or conversion):
            raise ValueError(f"the field {{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}")
        made.append((text, name))
    return made


def columns_named(template: object) -> list[str]:
    """The columns that a template of the teacher's prompts names.

    Raises:
        ValueError: it is no text, names none, or has braces that hold no column's name.

    Example:
        >>> columns_named("{prompt} Solved: {worked-solution} {{end}}")
        ['prompt', 'worked-solution']
    """
    told = "a text with columns in braces, e.g. '{prompt} A worked solution: {solution}'; braces of the text's own are doubled"
    if not isinstance(template, str):
        raise ValueError(f"teacher_prompt_template={template!r} must be {told}.")
    try:
        found = list(dict.fromkeys(name for _, name in _pieces(template) if name is not None))
    except ValueError as error:
        raise ValueError(f"teacher_prompt_template={template!r} cannot be read ({error}): it is {told}.") from error
    if not found:
        raise ValueError(f"teacher_prompt_template={template!r} names no column: it is {told}.")
    return found


def made_by(template: str, row: Mapping[str, Any]) -> Any:
    """A row's prompt for the teacher: of a text the template with the row's columns; of a chat the same in its last turn.

    Raises:
        ValueError: a column that is empty, or holds neither a text nor a number.

    Example:
        >>> made_by("{prompt} Hint: {hint}", {"prompt": "1+1?", "hint": "count"})
        '1+1? Hint: count'
        >>> made_by("{prompt}!", {"prompt": [{"role": "user", "content": "Hi"}]})
        [{'role': 'user', 'content': 'Hi!'}]
    """
    prompt = row[PROMPT]
    own = prompt if isinstance(prompt, str) else joined_parts(prompt[-1].get("content"))
    text = ""
    for piece, name in _pieces(template):
        text += piece
        if name is not None:
            text += _text(own if name == PROMPT else row[name], name)
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def _text(value: Any, name: str) -> str:
    """A column's value as it stands in a text."""
    if value is None or (isinstance(value, str) and not value):
        raise ValueError(f"its {name} is empty")
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"its {name} is {str(value)[:40]!r}, which is neither a text nor a number")
    return str(value)


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
    if PROMPT not in columns:
        return dataset  # which is told of by itself
    missing = sorted(set(columns_named(template)) - set(columns))
    if missing:
        raise ValueError(
            f"teacher_prompt_template names {', '.join(missing)}, which {role} does not have; it has: {', '.join(columns)} "
            "(the prompts' column is called prompt here)."
        )
    if COLUMN in columns or IDS in columns:
        raise ValueError(f"{role} has a column {COLUMN}, and teacher_prompt_template would make one: leave one of them out.")
    if not hasattr(dataset, "__len__"):
        return dataset.map(lambda row: {**row, COLUMN: _streamed(template, row)})
    made, wrong = [], []
    for number, row in enumerate(dataset):
        try:
            made.append(made_by(template, row))
        except _UNFILLED as error:
            wrong.append((number, str(error)))
    if wrong:
        raise ValueError(
            f"teacher_prompt_template cannot be filled in {rows_named([n for n, _ in wrong])} of {role}: {wrong[0][1]}. Fill "
            "or drop them."
        )
    return dataset.add_column(COLUMN, made)


def _streamed(template: str, row: Mapping[str, Any]) -> Any:
    try:
        return made_by(template, row)
    except _UNFILLED as error:
        raise ValueError(
            f"teacher_prompt_template cannot be filled in a row that arrived ({str(row[PROMPT])[:60]!r}): {error}. Filter the "
            "stream."
        ) from error


def teacher_prompt_problems(dataset: Any, role: str) -> Iterator[Problem]:
    """Rows whose prompt for the teacher is missing, empty or of another kind than the others'."""
    if not hasattr(dataset, "__len__") or COLUMN not in columns_of(dataset):
        return
    kinds: dict[str, list[int]] = {}
    for number, prompt in enumerate(dataset[COLUMN]):
        kinds.setdefault(kind_of(prompt), []).append(number)
    for kind, rows in kinds.items():
        if kind not in ("text", "chat"):
            lacks = "no" if kind in ("None", "empty") else f"{kind} as"
            yield Problem(
                f"{role} has {lacks} {COLUMN} in {rows_named(rows)} ({len(rows)} of {len(dataset)})",
                "the teacher reads it in place of the prompt",
                "give each row one, a text or a list of chat messages, or drop the row",
            )
    if {"text", "chat"} <= kinds.keys():
        yield Problem(
            f"{role} mixes texts and chats in {COLUMN} ({rows_named(kinds['chat'])} are chats)", do="make them one type"
        )

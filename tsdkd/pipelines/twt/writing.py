"""What of a student's answer is right, and what stands before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tsdkd.data.answers import is_correct
from tsdkd.pipelines.twt.prompts import Task


def marks(answers: Sequence[dict[str, Any]], references: Sequence[str], task: Task) -> list[bool]:
    """Which answers are right, by the library's grader."""
    return [is_correct(row["text"], gold, task.answer) for row, gold in zip(answers, references, strict=True)]


def rationale_of(text: str, task: Task) -> str:
    """What a student wrote before its answer."""
    pattern = task.answer or r"####|\\boxed"
    found = list(re.finditer(pattern, text))
    return text[: found[-1].start()].strip() if found else text.strip()

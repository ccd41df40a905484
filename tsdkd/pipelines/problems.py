"""Questions with their answers, as pipelines read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsdkd.data.files import load_rows


def problems_of(name: str, limit: int | None = None, labelled: bool = False) -> list[dict[str, Any]]:
    """The rows of a file of problems: `question` (or `prompt`), `label`, what it calls `answer`, and `level` where it has one.

    Raises:
        ValueError: a row without a question, or without an answer where there must be one.
    """
    made = []
    for number, row in enumerate(load_rows(str(Path(name).expanduser()) if Path(name).expanduser().exists() else name)):
        if limit is not None and number >= limit:
            break
        question, label = row.get("question") or row.get("prompt"), row.get("answer")
        label = None if isinstance(label, str) and not label.strip() else label
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{name}, row {number} has no question; its columns are {', '.join(row)}.")
        if labelled and label is None:
            raise ValueError(f"{name}, row {number} has no answer to score by; its columns are {', '.join(row)}.")
        level = {"level": str(row["level"])} if row.get("level") is not None else {}
        made.append({"problem": number, "question": question, "label": None if label is None else str(label), **level})
    if not made:
        raise ValueError(f"{name} holds no problems.")
    return made

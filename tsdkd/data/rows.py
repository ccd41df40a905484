"""JSONL files that a run appends to and goes on with: what an interruption leaves of the last line is no row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path, advice: str) -> list[dict[str, Any]]:
    """The rows of a file without a torn last line; none where there is no file.

    Raises:
        ValueError: a damaged line before the last, with `advice`.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged ({error}): {advice}.") from error
    return rows


def mend_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Leave these rows in a file that holds more lines, or whose last line is not ended."""
    text = path.read_text() if path.is_file() else ""
    if text and (len(rows) < len(text.splitlines()) or not text.endswith("\n")):
        replace_rows(path, rows)


def replace_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put these rows in the place of a file's, in one step."""
    whole = path.with_suffix(".partial")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.replace(path)

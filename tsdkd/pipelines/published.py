"""The tables that papers print, beside which ours stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def published(file: Path) -> dict[str, Any]:
    """A paper's tables by number: `title`, `columns`, `rows` (`label`, `values`, perhaps `student`) and perhaps a `note`."""
    return json.loads(file.read_text())["tables"]


def published_table(file: Path, number: str) -> str:
    """Markdown of one of them, with its note."""
    told = published(file)[number]
    heads = ["", *told["columns"]]
    lines = [f"The paper's Table {number}: {told['title']}.", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in told["rows"]:
        name = row["label"] + (f", {row['student']}" if row.get("student") else "")
        lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:g}' for value in row['values'])} |")
    return "\n".join([*lines, *(["", told["note"]] if "note" in told else [])])

"""A comparison as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: each method's mean scores over its seeds, with the lowest and highest, tokens and seconds; best first."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append({**row, **(row.get("scores") or {"accuracy": row["accuracy"]})})
    names = list(dict.fromkeys(name for row in rows for name in row.get("scores") or {"accuracy": 0}))

    def mean(label: str, what: str) -> float:
        return statistics.fmean(row[what] for row in by_label[label])

    heads = ["method", *(part for name in names for part in (name, "lowest-highest")), "seeds", "trained tokens", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label in sorted(by_label, key=lambda label: -mean(label, names[0])):
        cells = [label]
        for name in names:
            found = [row[name] for row in by_label[label]]
            cells += [f"{mean(label, name):.3f}", f"{min(found):.3f}-{max(found):.3f}"]
        cells += [str(len(by_label[label])), f"{mean(label, 'trained_tokens'):,.0f}", f"{mean(label, 'seconds'):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

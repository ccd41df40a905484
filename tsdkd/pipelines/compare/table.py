"""A comparison as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.pipelines.compare.runs import UNTRAINED


def _flat(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with each score by its name, and the names."""
    scores = [row.get("scores") or {"accuracy": row["accuracy"]} for row in rows]
    names = list(dict.fromkeys(name for own in scores for name in own))
    return [{**row, **own} for row, own in zip(rows, scores, strict=True)], names


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: each method's mean scores over its seeds, with the lowest and highest, tokens and seconds; best first."""
    scores, names = _flat(rows)
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in scores:
        by_label.setdefault(row["label"], []).append(row)

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


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each method's score with its 95 % interval, a mark a seed; the start and the teacher as lines.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'tsdkd[report]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores, names = _flat(rows)
    trained = [row for row in scores if row["method"] != UNTRAINED]
    labels = list(dict.fromkeys(row["label"] for row in trained))
    figure, axes = plt.subplots(1, len(names), figsize=(2 + 0.9 * len(labels) * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for place, label in enumerate(labels):
            own = [row for row in trained if row["label"] == label]
            for number, row in enumerate(own):
                low, high = _interval(row, name)
                at = place + 0.15 * (number - (len(own) - 1) / 2)
                bars = [[max(0.0, row[name] - low)], [max(0.0, high - row[name])]]
                axis.errorbar(at, row[name], yerr=bars, fmt="o", color=f"C{place}", capsize=3)
        for row, style in zip([row for row in scores if row["method"] == UNTRAINED], ("--", ":"), strict=False):
            axis.axhline(row[name], linestyle=style, color="0.4", label=row["label"])
        if any(row["method"] == UNTRAINED for row in scores):
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False)
        axis.set(title=name, ylabel="score (bars: 95 %)")
        axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    figure.tight_layout()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _interval(row: dict[str, Any], name: str) -> tuple[float, float]:
    """Of a share its Wilson interval."""
    if "low" in row and name == "accuracy":
        return row["low"], row["high"]
    n = row["n"].get(name.split("/")[0]) if isinstance(row["n"], dict) else row["n"]
    if not n or not 0 <= row[name] <= 1:
        return row[name], row[name]
    return wilson_interval(round(row[name] * n), n)

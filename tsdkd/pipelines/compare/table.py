"""A comparison as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.spent import COSTS, costs_of, mean_spent
from tsdkd.pipelines.compare.runs import UNTRAINED
from tsdkd.reporting.figures import MARKS, PALETTE, pyplot, save


def _flat(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with each score by its name, and the names."""
    scores = [row.get("scores") or {"accuracy": row["accuracy"]} for row in rows]
    names = list(dict.fromkeys(name for own in scores for name in own))
    return [{**row, **own} for row, own in zip(rows, scores, strict=True)], names


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: each method's mean scores over its seeds, with the lowest and highest, and what it took: tokens, FLOPs of the
    whole and of its parts, seconds; best first."""
    scores, names = _flat(rows)
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in scores:
        by_label.setdefault(row["label"], []).append(row)

    def mean(label: str, what: str) -> float:
        return statistics.fmean(row[what] for row in by_label[label])

    heads = ["method", *(part for name in names for part in (name, "lowest-highest")), "seeds", *COSTS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label in sorted(by_label, key=lambda label: -mean(label, names[0])):
        cells = [label]
        for name in names:
            found = [row[name] for row in by_label[label]]
            cells += [f"{mean(label, name):.3f}", f"{min(found):.3f}-{max(found):.3f}"]
        cells += [str(len(by_label[label])), *costs_of(mean_spent(by_label[label])).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each method's scores, a mark a seed with its 95 % interval, by method, and against what it took: tokens trained on,
    FLOPs, seconds; the start and the teacher as lines.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = pyplot()
    scores, names = _flat(rows)
    trained = [row for row in scores if row["method"] != UNTRAINED]
    labels = list(dict.fromkeys(row["label"] for row in trained))
    size = (max(13.0, 10.0 + 0.8 * len(labels)), 4.1 * len(names))
    figure, axes = plt.subplots(len(names), 4, figsize=size, squeeze=False, sharey="row", constrained_layout=True)
    for line, name in zip(axes, names, strict=True):
        for place, label in enumerate(labels):
            own = [row for row in trained if row["label"] == label]
            color, mark = PALETTE[place % len(PALETTE)], MARKS[place // len(PALETTE) % len(MARKS)]
            for number, row in enumerate(own):
                low, high = _interval(row, name)
                bars = [[max(0.0, row[name] - low)], [max(0.0, high - row[name])]]
                at = place + 0.15 * (number - (len(own) - 1) / 2)
                spent = sum(row.get("flops", {}).values()) / 1e12 or float("nan")
                for axis, x in zip(line, (at, row["trained_tokens"], spent, row["seconds"]), strict=True):
                    told = label if number == 0 and axis is line[1] else None
                    axis.errorbar(x, row[name], yerr=bars, fmt=mark, color=color, capsize=3, markersize=5, label=told)
        for row, style in zip([row for row in scores if row["method"] == UNTRAINED], ("--", ":"), strict=False):
            for axis in line:
                axis.axhline(row[name], linestyle=style, color="0.4", label=row["label"] if axis is line[1] else None)
        line[0].set(title=f"{name}, by method", ylabel=f"{name} (bars: 95 %, a mark a seed)")
        line[0].set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        line[1].set(title="against trained tokens", xlabel="tokens of completions trained on")
        line[2].set(title="against compute", xlabel="TFLOP of rollouts, teacher, student and loss")
        line[3].set(title="against time", xlabel="seconds of steps")
        line[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(4, len(labels) + 2), frameon=False, fontsize=8)
        for axis in line:
            axis.grid(linewidth=0.3)
    save(figure, path)


def final_scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row's scores with their intervals, as `reporting.run_page.run_page` shows them."""
    scores, names = _flat(rows)
    made = []
    for row in scores:
        for name in names:
            low, high = _interval(row, name)
            label = row["label"] if row["method"] == UNTRAINED else f"{row['label']}, seed {row['seed']}"
            told = {"label": label, "name": name, "step": row["steps"], "score": row[name], "spent": row}
            n = row["n"].get(name.split("/")[0]) if isinstance(row.get("n"), dict) else row.get("n")
            made.append({**told, "low": low if low < high else None, "high": high if low < high else None, "n": n})
    return made


def _interval(row: dict[str, Any], name: str) -> tuple[float, float]:
    """Of a share its Wilson interval."""
    if "low" in row and name == "accuracy":
        return row["low"], row["high"]
    n = row["n"].get(name.split("/")[0]) if isinstance(row["n"], dict) else row["n"]
    if not n or not 0 <= row[name] <= 1:
        return row[name], row[name]
    return wilson_interval(round(row[name] * n), n)

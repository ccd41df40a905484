"""What a run came to: each student's accuracy, where paths were sent (Figures 4 and 5), and the paper's tables beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.pipelines.published import published, published_table
from tsdkd.pipelines.tested import score_table, scored

PAPER = Path(__file__).parent / "paper.json"


def last_epoch(routed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a run's `routing.jsonl`, where each path went the last time that it was read."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in routed:
        newest[(str(row.get("id", row["problem"])), row["style"])] = row
    return list(newest.values())


def routing_rates(routed: Sequence[dict[str, Any]], by: str = "style") -> dict[str, list[float]]:
    """How often each student was given paths, by style (the paper's Figure 4), `level` or another column.

    Returns:
        `{value of the column: [a share each student]}`; rows without the column are left out.
    """
    found: dict[str, list[list[int]]] = {}
    for row in routed:
        if by in row:
            found.setdefault(str(row[by]), []).append(row["to"])
    return {
        name: [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        for name, rows in sorted(found.items(), key=_natural)
    }


def _natural(item: tuple[str, Any]) -> tuple[list[int], str]:
    """Level 10 behind level 2."""
    return [int(number) for number in re.findall(r"\d+", item[0])], item[0]


def routing_table(routed: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rates by style and, where problems have levels, by level, of the last epoch."""
    rows = last_epoch(routed)
    if not rows or all(all(row["to"]) for row in rows):
        return ""
    students = len(rows[0]["to"])
    lines = [f"| paths of | n |{''.join(f' student-{n + 1} |' for n in range(students))}", "|---" * (students + 2) + "|"]
    for by in ("style", "level"):
        for name, rates in routing_rates(rows, by).items():
            count = sum(str(row.get(by)) == name for row in rows)
            said = name if by == "style" else f"level {name.removeprefix('Level ')}"
            lines.append(f"| {said} | {count} | {' | '.join(f'{rate:.1%}' for rate in rates)} |")
    return "\n".join(["Share of paths that each student was given, when they were read last:", "", *lines])


def draw_routing(routed: Sequence[dict[str, Any]], path: Path) -> Path:
    """The rates by style as bars (Figure 4) and, where problems have levels, by level as a line a style (Figure 5).

    Raises:
        ValueError: matplotlib is not installed, or nothing was routed.
    """
    from tsdkd.data.intervals import wilson_interval
    from tsdkd.reporting.figures import MARKS, PALETTE, look, plain, pyplot, save

    rows = last_epoch(routed)
    if not rows:
        raise ValueError("nothing was routed: there is nothing to draw.")
    students, styles = len(rows[0]["to"]), list(routing_rates(rows))
    levels = list(routing_rates(rows, "level"))
    columns = 1 + (students if len(levels) > 1 else 0)
    figure, axes = pyplot().subplots(1, columns, figsize=(1.6 + 4.2 * columns, 4.6), constrained_layout=True, squeeze=False)

    def share(chosen: Sequence[dict[str, Any]], student: int) -> tuple[float, float, float]:
        on = sum(row["to"][student] for row in chosen)
        low, high = wilson_interval(on, len(chosen))
        mean = on / len(chosen)
        return mean, max(0.0, mean - low), max(0.0, high - mean)

    bars, wide = axes[0][0], 0.8 / students
    for student in range(students):
        values = [share([row for row in rows if row["style"] == style], student) for style in styles]
        places = [place + (student - (students - 1) / 2) * wide for place in range(len(styles))]
        heights, low, high = zip(*values, strict=True)
        own = {"color": PALETTE[student % len(PALETTE)], "label": f"student-{student + 1}"}
        bars.bar(places, heights, wide, yerr=[low, high], capsize=2, error_kw={"linewidth": 0.8}, **own)
    bars.set_xticks(range(len(styles)), [plain(style.replace("_", " ")) for style in styles], rotation=30, ha="right")
    bars.set(ylabel="share of paths given (bars: 95 %)", ylim=(0, 1), title="By style")
    bars.legend(frameon=False)
    for student in range(students if columns > 1 else 0):
        axis = axes[0][1 + student]
        for number, style in enumerate(styles):
            found = [(level, [r for r in rows if r["style"] == style and str(r.get("level")) == level]) for level in levels]
            points = [(levels.index(level), share(chosen, student)[0]) for level, chosen in found if chosen]
            label = plain(style.replace("_", " "))
            axis.plot(*zip(*points, strict=True), marker=MARKS[number % len(MARKS)], markersize=4, label=label, **look(number))
        axis.set_xticks(range(len(levels)), [plain(level) for level in levels])
        axis.set(xlabel="level of the problem", ylim=(0, 1), title=f"student-{student + 1}, by level")
        axis.grid(linewidth=0.3)
    if columns > 1:
        axes[0][1].legend(frameon=False, fontsize=8)
    return save(figure, path)


def report(scores: Path, students: Path, folder: Path) -> str:
    """What is printed at the end of a run; `report.md` has it with the paper's tables, `routing.png` the pictures where there
    is matplotlib.

    Args:
        scores: the file of the stage `scores`.
        students: the folder of the stage `students`.
        folder: the run's.
    """
    routed = [json.loads(line) for line in (students / "routing.jsonl").read_text().splitlines()]
    own = [part for part in (score_table(scored(scores)), routing_table(routed)) if part]
    tables = [published_table(PAPER, number) for number in published(PAPER)]
    (folder / "report.md").write_text("\n\n".join([*own, *tables]) + "\n")
    try:
        draw_routing(routed, folder / "routing.png")
    except ValueError:  # no matplotlib
        pass
    return "\n\n".join([*own, f"Beside the paper's Tables 1 and 2: {folder / 'report.md'}"])

"""What a run came to: accuracy and output tokens of each stage's student, beside the paper's own, and a picture of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.pipelines.published import published, published_table
from tsdkd.pipelines.tested import score_table, scored

_PAPER = Path(__file__).parent / "paper.json"


def paper() -> dict[str, Any]:
    """The paper's tables by number, see `published`."""
    return published(_PAPER)


def paper_table(number: str) -> str:
    """Markdown of one of the paper's tables, with its note."""
    return published_table(_PAPER, number)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Accuracy against mean output tokens, a mark a student, the stages joined in their order.

    Raises:
        ValueError: matplotlib is not installed, or nothing has an accuracy.
    """
    from tsdkd.reporting.figures import MARKS, PALETTE, pyplot, save

    graded = [row for row in rows if "accuracy" in row]
    if not graded:
        raise ValueError("no student has an accuracy: there is nothing to draw.")
    figure, axis = pyplot().subplots(figsize=(6.4, 4.4), constrained_layout=True)
    stages = [row for row in graded if row["label"].removeprefix("student-").isdigit()]
    axis.plot([row["tokens"] for row in stages], [row["accuracy"] for row in stages], color="0.6", linewidth=1, zorder=1)
    for number, row in enumerate(graded):
        bars = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        style = {"fmt": MARKS[number % len(MARKS)], "color": PALETTE[number % len(PALETTE)]}
        axis.errorbar(row["tokens"], row["accuracy"], yerr=bars, capsize=3, label=row["label"], zorder=2, **style)
    axis.set(
        xlabel="mean output tokens", ylabel=f"accuracy (bars: 95 %, n = {graded[0]['n']})", title="Accuracy against tokens"
    )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(linewidth=0.3)
    axis.legend(frameon=False)
    return save(figure, path)


def chosen(folder: Path) -> str:
    """What was kept and dropped, and how much of it was right where there are labels: the numbers of the paper's Table 5."""
    lines = []
    for path in sorted(folder.glob("[0-9][0-9]-*.stage.json")):
        about = json.loads(path.read_text())
        if about["stage"] in ("quality", "diversity"):
            own = {**about["settings"], **about["summary"]}
            said = [
                f"{name} {own[name]}"
                for name in ("quality", "threshold", "diversity", "kept", "dropped", "rows")
                if name in own
            ]
            said += [f"{name} {own[name]:.1%}" for name in ("right of kept", "right of dropped") if name in own]
            lines.append(f"- {about['stage']}: {', '.join(said)}")
    return "\n".join(lines)


def report(file: Path, folder: Path) -> str:
    """What is printed at the end of a run; `report.md` has it with all of the paper's tables, beside a picture where there is
    matplotlib."""
    rows = scored(file)
    own = [part for part in (score_table(rows), chosen(folder)) if part]
    (folder / "report.md").write_text("\n\n".join([*own, *map(paper_table, paper())]) + "\n")
    try:
        draw(rows, folder / "accuracy-tokens.png")
    except ValueError:  # no matplotlib, or a task whose answers are not graded here
        pass
    return "\n\n".join([*own, f"Beside the paper's Tables 1 to 7: {folder / 'report.md'}"])

"""The study's tables and figures from its rows: `python benchmarks/study/read.py` writes them between the marks of
`docs/study.md` and into `docs/images/study-*.png`.

Intervals are of a bootstrap over seeds and problems together, 95 %; differences are paired: the same seeds, the same problems.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from models import FULL
from problems import NUMBERS
from run import JOBS, LIKE, STARTS, rows_in

from tsdkd.data.spent import costs_of, mean_spent
from tsdkd.reporting.figures import MARKS, PALETTE, pyplot, save

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
IMAGES = PAGE.parent / "images"
DRAWS = 2000


@dataclass
class Scored:
    """A label's rows of one start.

    Attributes:
        right: `[seeds, problems]`, 0 or 1: first those held out by their numbers, then by their templates.
    """

    label: str
    rows: list[dict]
    right: np.ndarray

    @classmethod
    def of(cls, label: str, rows: list[dict]) -> Scored:
        rows = sorted(rows, key=lambda row: row["seed"])
        return cls(label, rows, np.array([[mark == "1" for mark in row["right"]] for row in rows], dtype=np.float64))

    def mean(self, what: str) -> float:
        """The mean over seeds of a row's figure."""
        return float(np.mean([row[what] for row in self.rows]))


def rows_of(start: str) -> dict[str, Scored]:
    """All rows of a start, whatever their configuration, by label."""
    by_label: dict[str, dict[int, dict]] = {}
    for job in JOBS:
        for row in rows_in(job.name) if job.start == start else ():
            by_label.setdefault(row["label"], {})[row["seed"]] = row
    return {label: Scored.of(label, list(rows.values())) for label, rows in by_label.items()}


def drawn(seeds: int, problems: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap's seeds `[draws, seeds]` and problems `[draws, problems]`, as numbers of rows and columns."""
    rng = np.random.default_rng(seed)
    return rng.integers(seeds, size=(DRAWS, seeds)), rng.integers(problems, size=(DRAWS, problems))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `[seeds, problems]`."""
    seeds, problems = drawn(*values.shape)
    by_problem = np.stack([values[rows].mean(0) for rows in seeds])
    means = np.take_along_axis(by_problem, problems, 1).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def difference(one: Scored, other: Scored) -> tuple[float, float, float] | None:
    """The difference of two labels' accuracies over the seeds that both have, with its interval; None where there is none."""
    seeds = sorted({row["seed"] for row in one.rows} & {row["seed"] for row in other.rows})
    if not seeds or one is other:
        return None
    pick = lambda scored: scored.right[[row["seed"] in seeds for row in scored.rows]]  # noqa: E731
    values = pick(one) - pick(other)
    return float(values.mean()), *interval(values)


def table(start: str) -> str:
    """Markdown: a line a label, best first."""
    scored = rows_of(start)
    numbers = dict(FULL.tested)[NUMBERS]
    heads = (
        "method | seeds | accuracy | against GKD | new numbers | new templates | sampled | pass@4 | calibration error | tokens"
    )
    lines = [f"| {heads} | TFLOP | seconds |", "|---" * 12 + "|"]
    for label in sorted(scored, key=lambda label: -scored[label].right.mean()):
        own = scored[label]
        low, high = interval(own.right)
        against = difference(own, scored[LIKE]) if LIKE in scored and label not in ("student", "teacher") else None
        told = "" if against is None else f"{against[0]:+.3f} ({against[1]:+.3f} to {against[2]:+.3f})"
        costs = costs_of(mean_spent(own.rows))
        figures = [f"{own.mean(what):.3f}" for what in ("sampled_accuracy", "pass_at_k", "calibration_error")]
        split = [f"{part.mean():.3f}" for part in (own.right[:, :numbers], own.right[:, numbers:])]
        cells = [label, str(len(own.rows)), f"{own.right.mean():.3f} ({low:.3f}-{high:.3f})", told, *split, *figures]
        cells += [f"{own.mean('answer_tokens'):.0f}", costs["TFLOP"], costs["seconds"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def frontier(path: Path) -> None:
    """Accuracy against FLOPs of the whole training, a panel a start."""
    plt = pyplot()
    starts = [start for start in STARTS if len(rows_of(start)) > 2]
    figure, axes = plt.subplots(1, len(starts), figsize=(6.2 * len(starts), 5.2), squeeze=False, constrained_layout=True)
    for axis, start in zip(axes[0], starts, strict=True):
        scored = rows_of(start)
        for place, (label, own) in enumerate(scored.items()):
            if label in ("student", "teacher"):
                axis.axhline(own.right.mean(), linestyle="--" if label == "student" else ":", color="0.4", label=label)
                continue
            low, high = interval(own.right)
            x, y = np.mean([sum(row["flops"].values()) for row in own.rows]) / 1e12, own.right.mean()
            style = {"fmt": MARKS[place // len(PALETTE) % len(MARKS)], "color": PALETTE[place % len(PALETTE)]}
            axis.errorbar(x, y, yerr=[[y - low], [high - y]], capsize=3, markersize=6, label=label, **style)
        axis.set(title=start, xlabel="TFLOP of rollouts, teacher, student and loss", ylabel="greedy accuracy (bars: 95 %)")
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    save(figure, path)


def main() -> None:
    text = PAGE.read_text()
    for start in STARTS:
        marks = f"<!-- {start}: generated by benchmarks/study/read.py -->", f"<!-- {start}: end -->"
        if marks[0] in text and rows_of(start):
            made = f"{marks[0]}\n{table(start)}\n{marks[1]}"
            text = re.sub(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), lambda _, made=made: made, text, flags=re.DOTALL)
    PAGE.write_text(text)
    frontier(IMAGES / "study-frontier.png")


if __name__ == "__main__":
    main()

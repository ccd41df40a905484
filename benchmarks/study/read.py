"""The study's tables and figures from its rows: `python benchmarks/study/read.py` writes them between the marks of
`docs/study.md` and into `docs/images/study-*.png`.

Intervals are of a bootstrap over seeds and problems together, 95 %; differences are paired: the same seeds, the same problems.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
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
MORE = " × "  # before a label's budget, where that is not GKD's
FEWEST = 3  # seeds of a verdict
# What the paper claims, and what the controls ask: of the two labels the first is to be better.
CLAIMS = (
    ("TSD-KD is better than GKD (Table 1)", "tsd_kd", "gkd"),
    ("TSD-KD is better than DistiLLM, here on given answers alone (Table 1)", "tsd_kd", "distillm"),
    ("TSD-KD is better than supervised KD (Table 1)", "tsd_kd", "supervised_kd"),
    ("TSD-KD is better than training on gold answers (Table 1)", "tsd_kd", "seq_kd"),
    ("the gate helps the direct term (Table 3)", "gate alone", "gkd"),
    ("the ranking helps (Table 3)", "ranking alone", "gkd"),
    ("minimising the entropy helps (Table 3)", "entropy alone", "gkd"),
    ("a short opener is better than ranking all tokens (Fig. 3)", "tsd_kd", "c = 1"),
    ("ten candidates are better than two (Fig. 4)", "tsd_kd", "k = 2"),
    ("a tenth of the tokens is better than half of them (Fig. 5)", "tsd_kd", "ρ = 0.5"),
    ("β = 0.9 is better than 0.5 (Fig. 6)", "tsd_kd", "β = 0.5"),
    ("on policy is better than off policy (Table 6)", "tsd_kd", "tsd_kd off policy"),
    ("an adaptive opener is better (Table 7)", "adaptive opener", "tsd_kd"),
    ("TSD-KD is better than GKD with LoRA (Table 9)", "tsd_kd LoRA", "gkd LoRA"),
    ("the paper's ranking direction is better than its release's (control)", "tsd_kd", "ranking reversed"),
    ("the opener is better than as many random tokens (control)", "tsd_kd", "random opener"),
    ("uncertain tokens are better than random ones (control)", "gkd top entropy 20 %", "gkd random 20 %"),
    ("a teacher is better than none: entropy alone (control)", "tsd_kd", "entropy without a teacher"),
    ("a teacher is better than none: suppression (control)", "gkd", "suppression without a teacher"),
    ("the scaled weights are better than the paper's (ours)", "tsd_kd scaled", "tsd_kd"),
    ("stages weighed by the teacher's mass are better than the paper's form (ours)", "tsd_kd teacher's mass", "tsd_kd"),
    ("the scaled weights are better than GKD (ours)", "tsd_kd scaled", "gkd"),
    ("the first 30 % of the tokens are better than all, at equal FLOPs (ours)", "gkd first 30 %", "gkd"),
)


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

    def mean_flops(self) -> float:
        """TFLOP of the whole training, the mean over seeds."""
        return float(np.mean([sum(row["flops"].values()) for row in self.rows])) / 1e12

    def mean(self, what: str) -> float:
        """The mean over seeds of a row's figure."""
        return float(np.mean([row[what] for row in self.rows]))


@cache
def rows_of(start: str) -> dict[str, Scored]:
    """All rows of a start, whatever their configuration, by label."""
    by_label: dict[str, dict[int, dict]] = {}
    for job in JOBS:
        for row in rows_in(job.name) if job.start == start else ():
            own = by_label.setdefault(row["label"], {})
            other = own.setdefault(row["seed"], row)
            if any(other.get(name) != row.get(name) for name in ("options", "training", "right")):
                raise SystemExit(
                    f"{job.name} has two rows of {row['label']}, seed {row['seed']}, that differ: keep one making."
                )
            own[row["seed"]] = row
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


def shared(one: Scored, other: Scored) -> list[int]:
    """The seeds that two labels both have."""
    return sorted({row["seed"] for row in one.rows} & {row["seed"] for row in other.rows})


def difference(one: Scored, other: Scored) -> tuple[float, float, float] | None:
    """The difference of two labels' accuracies over the seeds that both have, with its interval; None where there is none."""
    seeds = shared(one, other)
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


def verdict(one: Scored | None, other: Scored | None) -> str:
    """Whether the first is better, with the interval of the difference and the seeds."""
    found = None if one is None or other is None else difference(one, other)
    if found is None or one is None or other is None:
        return "not run yet"
    value, low, high = found
    seeds = len(shared(one, other))
    told = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
    if seeds < FEWEST:
        told = "too few seeds"
    return f"{told}: {value:+.3f} ({low:+.3f} to {high:+.3f}), {seeds} seeds"


def claims() -> str:
    """Markdown: each claim at each start that has rows."""
    by_start = {start: scored for start in STARTS if len(scored := rows_of(start)) > 2}
    lines = [f"| claim | {' | '.join(by_start)} |", "|---" * (1 + len(by_start)) + "|"]
    for text, better, worse in CLAIMS:
        cells = [verdict(scored.get(better), scored.get(worse)) for scored in by_start.values()]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forest(path: Path) -> None:
    """Each label's accuracy at GKD's FLOPs with its interval, a panel a start; the student and the teacher as lines."""
    plt = pyplot()
    starts = [start for start in STARTS if len(rows_of(start)) > 2]
    figure, axes = plt.subplots(1, len(starts), figsize=(6.4 * len(starts), 5.0), squeeze=False, constrained_layout=True)
    for axis, start in zip(axes[0], starts, strict=True):
        scored = {label: own for label, own in rows_of(start).items() if MORE not in label}
        labels = sorted(set(scored) - {"student", "teacher"}, key=lambda label: scored[label].right.mean())
        for place, label in enumerate(labels):
            low, high = interval(scored[label].right)
            value = scored[label].right.mean()
            color = PALETTE[1] if "tsd_kd" in label else PALETTE[0]
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color=color)
        for label, style in (("student", "--"), ("teacher", ":")):
            axis.axvline(scored[label].right.mean(), linestyle=style, color="0.4", label=label)
        axis.set_yticks(range(len(labels)), [f"{label} ({len(scored[label].rows)})" for label in labels])
        axis.set(title=start, xlabel="greedy accuracy (bars: 95 %; in brackets the seeds)")
        axis.grid(linewidth=0.3)
        axis.legend(loc="lower right", fontsize=8)
    save(figure, path)


def frontier(path: Path) -> None:
    """Accuracy against FLOPs of the whole training, a line a label over its budgets; nothing where no start has several."""
    plt = pyplot()
    starts = [start for start in STARTS if any(MORE in label for label in rows_of(start))]
    if not starts:
        return
    figure, axes = plt.subplots(1, len(starts), figsize=(6.4 * len(starts), 5.2), squeeze=False, constrained_layout=True)
    for axis, start in zip(axes[0], starts, strict=True):
        scored = rows_of(start)
        named = list(dict.fromkeys(label.partition(MORE)[0] for label in scored if MORE in label))
        for place, name in enumerate(named):
            own = [one for label, one in scored.items() if label.partition(MORE)[0] == name]
            points = sorted((one.mean_flops(), one.right.mean(), *interval(one.right)) for one in own)
            x, y = [point[0] for point in points], [point[1] for point in points]
            bars = [[point[1] - point[2] for point in points], [point[3] - point[1] for point in points]]
            style = {"marker": MARKS[place % len(MARKS)], "color": PALETTE[place % len(PALETTE)]}
            axis.errorbar(x, y, yerr=bars, capsize=3, label=name, **style)
        axis.set(title=start, xscale="log", ylabel="greedy accuracy (bars: 95 %)")
        axis.set(xlabel="TFLOP of rollouts, teacher, student and loss")
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    text = PAGE.read_text()
    made_of = {"claims": claims} | {start: lambda start=start: table(start) for start in STARTS if rows_of(start)}
    for name, make in made_of.items():
        marks = f"<!-- {name}: generated by benchmarks/study/read.py -->", f"<!-- {name}: end -->"
        if marks[0] in text:
            made = f"{marks[0]}\n{make()}\n{marks[1]}"
            text = re.sub(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), lambda _, made=made: made, text, flags=re.DOTALL)
    PAGE.write_text(text)
    forest(IMAGES / "study-methods.png")
    frontier(IMAGES / "study-frontier.png")


if __name__ == "__main__":
    main()

"""Which of a run's numbers stand in which panel, and what tells several runs apart; of pages and of figures alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tsdkd.data.runs import Run


@dataclass(frozen=True)
class Line:
    """A curve of a panel.

    Attributes:
        label: in the legend.
        look: the place of its colour and stroke: of several runs the run's, so that a run looks the same in every panel.
        points: (step, value), or (step, value, low, high) of a score.
    """

    label: str
    look: int
    points: list[tuple[float, ...]]


@dataclass(frozen=True)
class Panel:
    """A picture of a run's numbers over its steps."""

    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)


# Title, unit, and the logged names; a name that ends in / takes all that begin with it.
_LAYOUT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "", ("loss", "eval_loss")),
    ("Terms of the loss", "weighted term", ("loss/",)),
    ("Entropy per token", "nats", ("student/entropy", "teacher/entropy", "entropy_selection/mean")),
    ("Gate", "mean weight", ("gate/mean",)),
    ("Selected tokens", "share of tokens", ("opener/share", "selection/share")),
    ("Agreement of student and teacher", "top-1 share, Kendall's tau", ("candidates/top1_agreement", "candidates/tau")),
    ("Length of completions", "tokens", ("completions/mean_length", "opener/tokens")),
    (
        "Cut, empty, repeating completions",
        "share",
        ("completions/clipped_ratio", "completions/empty", "completions/repetition"),
    ),
    ("An end where completions stop", "probability", ("completions/end_probability",)),
    ("Time of a step", "seconds", ("time/rollout", "time/teacher", "time/student", "time/loss")),
    ("Compute until then, by part", "TFLOP", ("spent/tflop/",)),
    ("Speed", "tokens/s", ("tokens_per_second",)),
    ("Speed by part", "tokens/s of that part", ("speed/",)),
    ("Memory", "GiB, peak", ("memory/peak_gib",)),
    ("Gradients", "norm", ("grad_norm", "hidden_grad_norm/")),
    ("Learning rate", "", ("learning_rate",)),
)
_NO_CURVE = ("accuracy", "low", "high", "n", "total_flos")
_OTHER_SPELLINGS = "grad_norm/"  # the old name of hidden_grad_norm/
# Options that tell a folder or a machine, no run.
_SAME_RUN = (
    "output_dir", "run_name", "logging_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_model_id", "local_rank",
    "dataloader_num_workers", "disable_tqdm", "report_to",
)  # fmt: skip


def labels(runs: Sequence[Run]) -> list[str]:
    """What each run is called: the options in which it differs from the others, or its folder's name."""
    short = [run.folder.resolve().name or str(run.folder) for run in runs]
    parents = [run.folder.resolve().parent.name for run in runs]
    folders = [f"{parent}/{name}" if short.count(name) > 1 else name for parent, name in zip(parents, short, strict=True)]
    if len(runs) == 1:
        return folders
    differing = differences(runs)
    made = []
    for place in range(len(runs)):
        told = [f"{name}={values[place]}" for name, values in differing.items() if values[place] is not None]
        while len(told) > 1 and len(", ".join(told)) > 90:  # the first tell most: the method, or what was set
            told.pop()
        made.append(", ".join(told) if told and len(", ".join(told)) <= 90 else folders[place])
    doubled = {label for label in made if made.count(label) > 1}
    made = [f"{label} ({folders[place]})" if label in doubled else label for place, label in enumerate(made)]
    return [label if made.count(label) == 1 else f"{label} {place + 1}" for place, label in enumerate(made)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options in which runs differ, and each run's value; a method's options by their own names."""
    configs = [_options(run) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    found = {name: [config.get(name) for config in configs] for name in names if name not in _SAME_RUN}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _options(run: Run) -> dict[str, Any]:
    own = run.record.get("method_options")
    config = {name: value for name, value in run.config.items() if name != "method_options"}
    named = {"method": run.record["method"]} if "method" in run.record else {}
    return {**named, **config, **(own if isinstance(own, dict) else {}), **named}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels that these runs have numbers for; of several runs a panel a number, with a line for each run."""
    made: list[Panel] = []
    named, runs = labels(runs), [with_speeds(run) for run in runs]
    scored = dict.fromkeys(score["name"] for run in runs for score in run.scores)
    for name in scored:
        lines = [Line(named[place], place, _scores(run, name)) for place, run in enumerate(runs)]
        made.append(Panel(f"Score: {name}", "share" if _is_share(runs, name) else "", [line for line in lines if line.points]))
    for title, unit, wanted in _LAYOUT:
        names = _matching(runs, wanted)
        if len(runs) == 1:
            lines = [Line(_spoken(runs[0], name), place, _points(runs[0], name)) for place, name in enumerate(names)]
            made.append(Panel(title, unit, [line for line in lines if line.points]))
            continue
        for name in names:
            lines = [Line(named[place], place, _points(run, name)) for place, run in enumerate(runs)]
            made.append(Panel(f"{title}: {name}" if len(names) > 1 else title, unit, [one for one in lines if one.points]))
    return [panel for panel in made if panel.lines]


def rest(runs: Sequence[Run]) -> list[Panel]:
    """A panel of each number that stands in no other."""
    used = {name for _, _, wanted in _LAYOUT for name in _matching(runs, wanted)}
    named, made = labels(runs), []
    for name in dict.fromkeys(name for run in runs for name in run.names):
        if name in used or name.startswith(_OTHER_SPELLINGS) or name in _NO_CURVE or name.startswith("train_"):
            continue
        lines = [Line(named[place], place, _points(run, name)) for place, run in enumerate(runs)]
        if any(line.points for line in lines):
            made.append(Panel(name, "", [line for line in lines if line.points]))
    return made


def _matching(runs: Sequence[Run], wanted: tuple[str, ...]) -> list[str]:
    there = dict.fromkeys(name for run in runs for name in run.names)
    return [name for want in wanted for name in there if name == want or (want.endswith("/") and name.startswith(want))]


def with_speeds(run: Run) -> Run:
    """A run with `speed/PART` in its rows: the tokens trained on by the seconds of each part of a step."""
    rows = []
    for row in run.rows:
        seconds = {name[5:]: row[name] for name in row if name.startswith("time/") and isinstance(row[name], (int, float))}
        speed, whole = row.get("tokens_per_second"), sum(seconds.values())
        own = {}
        if isinstance(speed, (int, float)):
            own = {f"speed/{part}": speed * whole / spent for part, spent in seconds.items() if spent > 0}
        rows.append({**row, **own})
    return dataclasses.replace(run, rows=rows)


def _points(run: Run, name: str) -> list[tuple[float, ...]]:
    weight = _weight(run, name)
    return [(step, weight * value) for step, value in run.series(name)]


def _weight(run: Run, name: str) -> float:
    """Of a term of the loss its weight, where the run says it."""
    terms = run.record.get("terms")
    found = terms.get(name.removeprefix("loss/"), 1.0) if name.startswith("loss/") and isinstance(terms, dict) else 1.0
    return found if isinstance(found, (int, float)) else 1.0


def _spoken(run: Run, name: str) -> str:
    weight = _weight(run, name)
    short = name.removeprefix("loss/")
    if name.startswith("loss/"):
        return short if weight == 1 else f"{weight:g} × {short}"
    return name


def _scores(run: Run, name: str) -> list[tuple[float, ...]]:
    found = sorted((score for score in run.scores if score["name"] == name), key=lambda score: score["step"])
    return [
        (s["step"], s["score"], s["low"], s["high"])
        if s["low"] is not None and s["high"] is not None
        else (s["step"], s["score"])
        for s in found
    ]


def _is_share(runs: Sequence[Run], name: str) -> bool:
    return all(0 <= score["score"] <= 1 for run in runs for score in run.scores if score["name"] == name)


def as_json(panel: Panel) -> dict[str, Any]:
    """A panel as the page draws it, thinned where a curve has more points than a screen."""
    made = dataclasses.asdict(panel)
    for line in made["lines"]:
        line["points"] = [[_short(part) for part in point] for point in _thinned(line["points"])]
    return made


def _thinned(points: list, most: int = 600) -> list:
    """At most so many, the first and the last among them; of each stretch the middle one."""
    if len(points) <= most:
        return points
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None

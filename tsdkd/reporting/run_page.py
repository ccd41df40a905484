"""The run page: what a run or several did, in one HTML file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.runs import CURVE, REPORT, Run, read_run
from tsdkd.data.spent import COSTS, costs_of
from tsdkd.reporting.figures import draw_curve
from tsdkd.reporting.pages import as_bytes, in_script, page
from tsdkd.reporting.panels import as_json, differences, labels, panels, rest

logger = logging.getLogger(__name__)


def run_page(runs: Sequence[Run], title: str = "", scores: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of some runs.

    Args:
        runs: what `data.runs.read_run` gave, also of broken and unfinished ones.
        title: of the page.
        scores: rows of final scores, `label`, `score`, `low`, `high`, `n`, for a table of their own, in which they stand in
            place of the runs' equal ones.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("there is no run to show: pass the folder of one.")
    named, given = labels(runs), {(score["name"], score["step"], score["score"]) for score in scores}
    own = [score for score in _last_scores(runs, named) if (score["name"], score["step"], score["score"]) not in given]
    data = {
        "panels": [as_json(panel) for panel in panels(runs)],
        "rest": [as_json(panel) for panel in rest(runs)],
        "runs": named,
        "samples": [_samples(run) for run in runs],
    }
    return page(
        "run_page",
        title=title or (f"Run {named[0]}" if len(runs) == 1 else f"{len(runs)} runs"),
        runs=[_facts(run, label) for run, label in zip(runs, named, strict=True)],
        differing=differences(runs) if len(runs) > 1 else {},
        scores=[{**score, "costs": costs_of(score.get("spent"))} for score in [*scores, *own]],
        costs=COSTS if any(score.get("spent") for score in [*scores, *own]) else (),
        data=in_script(data),
        drawn=bool(data["panels"] or data["rest"]),
    )


def _facts(run: Run, label: str) -> dict[str, Any]:
    record = run.record
    versions, summary = _mapping(record.get("versions")), _mapping(record.get("summary"))
    last = {name: value for row in run.rows for name, value in row.items() if name.startswith(("train_", "num_tokens"))}
    facts = {
        "started": record.get("started"),
        "hardware": record.get("hardware"),
        "processes": record.get("processes"),
        "commit": record.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seed": record.get("seed"),
        "steps logged": max((row["step"] for row in run.rows), default=None),
        **costs_of(run.spent_at(math.inf)),
        **{name.replace("_", " "): f"{value:,.6g}" for name, value in last.items() if isinstance(value, (int, float))},
    }
    return {
        "label": label,
        "folder": run.folder.resolve().name,
        "missing": run.missing,
        "summary": summary,
        "facts": {name: value for name, value in facts.items() if value not in (None, "")},
        "command": record.get("command") or "",
        "config": run.config,
        "samples": len(run.samples),
    }


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _samples(run: Run) -> list[dict[str, Any]]:
    """The completions that were kept, early to late, as strips of tokens."""
    made = []
    for row in run.samples:
        columns = _mapping(row.get("columns"))
        tokens = [str(token) for token in row["tokens"]]
        kept = {name: values for name, values in columns.items() if isinstance(values, list) and len(values) == len(tokens)}
        made.append({"step": row["step"], "prompt": str(row.get("prompt", "")), "tokens": tokens, "columns": kept})
    return made


def _last_scores(runs: Sequence[Run], named: Sequence[str]) -> list[dict[str, Any]]:
    """Each run's first and last score of each name."""
    made = []
    for run, label in zip(runs, named, strict=True):
        for name in dict.fromkeys(score["name"] for score in run.scores):
            own = sorted((s for s in run.scores if s["name"] == name), key=lambda score: score["step"])
            ends = [own[0]] if len(own) == 1 else [own[0], own[-1]]
            made += [{**score, "label": label, "spent": run.spent_at(score["step"])} for score in ends]
    return made


def write_report(folder: Path) -> list[str]:
    """A run's picture and page in its folder; the names of what was written. Without matplotlib there is no picture."""
    run, made = read_run(folder), []
    try:
        if draw_curve(run, folder / CURVE):
            made.append(CURVE)
    except ValueError as error:
        logger.info("no curve was drawn: %s", error)
    (folder / REPORT).write_bytes(as_bytes(run_page([run])))
    return [*made, REPORT]

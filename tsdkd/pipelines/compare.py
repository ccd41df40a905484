"""Several methods from one start, on the same prompts and the same budget, one row each; an interrupted comparison goes on."""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdkd.data.rows import mend_rows, read_rows
from tsdkd.provenance import provenance


@dataclass(frozen=True)
class Run:
    """One method with its options and one seed; `label` is its name in the table."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{''.join(c if c.isalnum() or c in '._-' else '-' for c in self.label)}-seed{self.seed}"


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row["label"], row["method"], row["options"], row["seed"], row["settings"]], sort_keys=True)


def digest(texts: Sequence[str], paths: Sequence[str | None]) -> str:
    """What a row depends on beside its settings: texts, files' contents, and of folders each file's name, size and time."""
    made = hashlib.sha256("\0".join(texts).encode())
    for path in (Path(name) for name in paths if name):
        if path.is_file():
            made.update(path.read_bytes())
        elif path.is_dir():
            for file in sorted(path.iterdir()):
                made.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return made.hexdigest()[:16]


def compare(
    runs: Sequence[Run],
    train: Callable[[Run], tuple[Any, dict[str, Any]]],
    score: Callable[[Any], dict[str, Any]],
    out: Path,
    settings: dict[str, Any],
    *,
    writes: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train and score every run that `out` has no row of.

    Args:
        runs: in order.
        train: from a run to what `score` takes and to facts of the training (`steps`, `trained_tokens`).
        score: from a trained student to its figures.
        out: JSONL, a row a run, appended as soon as the run is done.
        settings: what all runs share; a row of other settings is another run's.
        writes: whether this process writes the rows, one of several.

    Returns:
        the rows of these runs, in order.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    found = read_rows(out, "remove it, that run is then made again")
    done = {_identity(row): row for row in found}
    if writes:
        mend_rows(out, found)
    rows = []
    for number, run in enumerate(runs, 1):
        wanted = {"label": run.label, "method": run.method, "options": run.options, "seed": run.seed, "settings": settings}
        row = done.get(_identity(wanted))
        if row is None:
            say(f"run {number} of {len(runs)}: {run.label}, seed {run.seed}")
            began = time.perf_counter()
            student, facts = train(run)
            seconds = round(time.perf_counter() - began, 1)
            row = {**wanted, **score(student), **facts, "seconds": seconds, "provenance": provenance(run.seed)}
            del student  # two runs' models need not fit beside each other
            gc.collect()
            if writes:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


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

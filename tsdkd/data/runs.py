"""A run's folder: what a run leaves of itself, and how it is read back, also where it is broken or unfinished.

| file | what |
|---|---|
| `run.json` | `schema`, command, versions, commit, hardware, method, its options and terms, models, `config` (every option) |
| `config.yaml` | the options that differ from their defaults: `tsdkd train --config config.yaml` makes the run again |
| `metrics.jsonl` | a row a log: `step` and the logged names; rows of scores have `accuracy`, `low`, `high`, `n` |
| `samples.jsonl` | a row a completion that was kept: `step`, `tokens`, `columns` of numbers a token |
| `benchmarks.jsonl` | a `ScoreRow` a score while training |
| `spent.json` | tokens trained on, FLOPs by part and seconds until now; beside a saved student and in a checkpoint, too |
| `curve.png`, `report.html` | pictures of them |
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import lines_of
from tsdkd.data.spent import is_spent

SCHEMA = 1
RUN, CONFIG, METRICS, SAMPLES = "run.json", "config.yaml", "metrics.jsonl", "samples.jsonl"
BENCHMARKS, CURVE, REPORT = "benchmarks.jsonl", "curve.png", "report.html"


@dataclass(frozen=True)
class Run:
    """What stands in a run's folder.

    Attributes:
        folder: its path.
        record: `run.json`; empty where it cannot be read.
        rows: of `metrics.jsonl`, by step; numbers that are none (NaN) are None.
        scores: of `benchmarks.jsonl` and of rows with an accuracy: `step`, `name`, `score`, `low`, `high`, `n`.
        samples: of `samples.jsonl`.
        missing: a sentence for each thing that is not there or is broken.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Every option."""
        found = self.record.get("config")
        return found if isinstance(found, dict) else {}

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a logged name; NaN where what was logged is no finite number."""
        return [
            (row["step"], math.nan if row[name] is None else row[name]) for row in self.rows if _is_number(row.get(name, ""))
        ]

    @property
    def names(self) -> list[str]:
        """Every name with a number in it, in the order of its first log."""
        found = {name for row in self.rows for name, value in row.items() if _is_number(value)}
        order = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in order if name in found and name != "step"]

    def spent_at(self, step: float) -> dict[str, Any] | None:
        """What the run had taken by a step (`data.spent`), from the last row of its log by then; None where it is not said."""
        rows = [row for row in self.rows if row["step"] <= step and _number(row.get("spent/trained_tokens")) is not None]
        if not rows:
            return None
        last, prefix = rows[-1], "spent/tflop/"
        flops = {
            name[len(prefix) :]: 1e12 * value for name, value in last.items() if name.startswith(prefix) and _number(value)
        }
        found = {"trained_tokens": last["spent/trained_tokens"], "flops": flops, "seconds": last.get("spent/seconds")}
        return found if is_spent(found) else None


def read_run(folder: Path | str) -> Run:
    """A run's folder, whatever of it is there.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: pass the output_dir of a run.")
    missing: list[str] = []
    record = _record(folder / RUN, missing)
    rows = [row for row in _rows(folder / METRICS, missing, "no metrics were logged") if _is_step(row)]
    rows.sort(key=lambda row: row["step"])
    ended = max((place for place, row in enumerate(rows) if "train_runtime" in row), default=-1)
    trained = max((place for place, row in enumerate(rows) if "loss" in row and "train_runtime" not in row), default=-1)
    if rows and record and ended < trained:
        missing.append("The run has not ended: it goes on, or was cut off.")
    unsound: dict[str, int] = {}
    for name in (name for row in rows for name, value in row.items() if value is None):
        unsound[name] = unsound.get(name, 0) + 1
    missing += [f"{name} is no finite number in {count} rows of {METRICS}." for name, count in unsound.items()]
    scores = [score for row in rows if (score := _accuracy(row)) is not None]
    if (folder / BENCHMARKS).is_file():
        scores += [score for row in _rows(folder / BENCHMARKS, missing) if (score := _benchmark(row)) is not None]
    samples = _rows(folder / SAMPLES, missing) if (folder / SAMPLES).is_file() else []
    kept = [_sample(row) for row in samples if _is_step(row) and isinstance(row.get("tokens"), list)]
    return Run(folder, record, rows, scores, kept, missing)


def runs_in(folders: list[Path]) -> list[Run]:
    """The runs of some folders; of a folder without a run's files those of the folders in it.

    Raises:
        ValueError: no such folder.
    """
    made = []
    for folder in folders:
        inner = [] if not folder.is_dir() or (folder / RUN).is_file() or (folder / METRICS).is_file() else _inner(folder)
        made += [read_run(path) for path in (inner or [folder])]
    return made


def _inner(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and ((path / RUN).is_file() or (path / METRICS).is_file()))


def _record(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"{path.name} is not there: options, versions and hardware are unknown.")
        return {}
    try:
        found = _finite(json.loads(path.read_text(encoding="utf-8-sig", errors="replace")))
    except (ValueError, OSError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read ({error}).")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{path.name} holds no mapping.")
        return {}
    if isinstance(found.get("schema"), int) and found["schema"] > SCHEMA:
        missing.append(f"{path.name} was written by a later version (schema {found['schema']}, read here: {SCHEMA}).")
    return found


def _rows(path: Path, missing: list[str], absent: str = "") -> list[dict[str, Any]]:
    """A file's rows; a line that is none is told, and not read."""
    if not path.is_file():
        missing.append(f"{path.name} is not there: {absent}.")
        return []
    try:
        lines = lines_of(path)
    except (ValueError, OSError) as error:
        missing.append(f"{path.name} cannot be read ({error}).")
        return []
    rows, broken = [], []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            broken.append(number)
            continue
        if isinstance(row, dict):
            rows.append(_finite(row))
        else:
            broken.append(number)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        missing.append(f"{path.name}: line {broken[0]}{more} cannot be read.")
    if not rows:
        missing.append(f"{path.name} is empty.")
    return rows


_MOST = 1e150  # beyond it nothing can be drawn


def _finite(value: Any) -> Any:
    """A value, None where it is a number that is not finite or cannot be drawn; in lists and mappings likewise."""
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if abs(value) < _MOST else None  # NaN is less than nothing
    return value


def _is_number(value: Any) -> bool:
    """A number, or what was one and is not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A kept completion whose columns hold numbers alone."""
    found = row.get("columns")
    columns = found if isinstance(found, dict) else {}
    kept = {name: values for name, values in columns.items() if isinstance(values, list) and all(map(_is_number, values))}
    return {**row, "columns": kept}


def _is_step(row: dict[str, Any]) -> bool:
    step = row.get("step")
    return isinstance(step, (int, float)) and not isinstance(step, bool) and abs(step) < 2**53


def _number(value: Any) -> Any:
    """A number, or None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _accuracy(row: dict[str, Any]) -> dict[str, Any] | None:
    if _number(row.get("accuracy")) is None:
        return None
    ends = {name: _number(row.get(name)) for name in ("low", "high", "n")}
    return {"step": row["step"], "name": "accuracy", "score": row["accuracy"], **ends}


def _benchmark(row: dict[str, Any]) -> dict[str, Any] | None:
    if not _is_step(row) or not isinstance(row.get("score"), (int, float)) or not row.get("main", True):
        return None
    error = row.get("stderr")
    low, high = (row["score"] - 1.96 * error, row["score"] + 1.96 * error) if isinstance(error, (int, float)) else (None, None)
    n = row.get("n")
    if isinstance(n, int) and n > 0 and 0 <= row["score"] <= 1:
        low, high = wilson_interval(round(row["score"] * n), n)
    name = f"{row.get('task')}/{row.get('metric')}"
    return {"step": row["step"], "name": name, "score": row["score"], "low": low, "high": high, "n": n}

"""Rows of JSONL: files that a run appends to and goes on with (what an interruption leaves of the last line is no row), and the
one row that a score is, wherever it is written and read."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What `tsdkd.provenance` says; in a file these stand beside the score.
_ORIGIN = ("commit", "python", "versions", "hardware", "seed", "command")
_NEEDED = ("task", "requested", "task_digest", "metric", "score", "model", "model_digest", "label", "settings", "rows")


def read_rows(path: Path, advice: str) -> list[dict[str, Any]]:
    """The rows of a file without a torn last line; none where there is no file.

    Raises:
        ValueError: a damaged line before the last, with `advice`.
    """
    return [row for _, row in _numbered_rows(path, advice)]


def _numbered_rows(path: Path, advice: str) -> list[tuple[int, dict[str, Any]]]:
    """`read_rows` with the numbers of their lines."""
    lines = lines_of(path) if path.is_file() else []
    rows = []
    for number, line in lines:
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            if number < lines[-1][0]:
                raise ValueError(f"{path}, line {number} is damaged ({error}): {advice}.") from error
    return rows


def lines_of(path: Path) -> list[tuple[int, str]]:
    """The lines of a JSONL file with their numbers, from 1: without a byte-order mark and blank lines, ended by line feeds (or
    carriage returns before them) alone, since a text may hold other separators."""
    return _lines_in(text_of(path))


def _lines_in(text: str) -> list[tuple[int, str]]:
    return [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def parsed_lines(path: Path, text: str | None = None) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines; its text, where it has been read already.

    Raises:
        ValueError: a line that is no JSON.
    """
    for number, line in lines_of(path) if text is None else _lines_in(text):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): mend or remove it.") from error


def text_of(path: Path) -> str:
    """A file's text without a byte-order mark, also of one that is packed (`.gz`) or UTF-16.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): it is damaged.") from error
    try:
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 ({error.reason}): convert it, iconv -t UTF-8.") from error


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, so that they stand together or not at all."""
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def mend_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Leave these rows in a file that holds more lines, or whose last line is not ended."""
    text = path.read_text() if path.is_file() else ""
    if text and (len(rows) < len(lines_of(path)) or not text.endswith("\n")):
        replace_rows(path, rows)


def replace_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put these rows in the place of a file's, in one step."""
    whole = path.with_suffix(".partial")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.replace(path)


class RowFile:
    """A file of rows, each forced to the disk as it comes; opened again it goes on behind the last whole one. For threads, too.

    Args:
        path: of the file; its folder is made.
        advice: what is said of a damaged line before the last.

    Attributes:
        rows: those that were there when it was opened.

    Raises:
        ValueError: a damaged line before the last.
    """

    def __init__(self, path: Path, advice: str = "remove it, what it held is then made again") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, read_rows(path, advice)
        mend_rows(path, self.rows)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        text = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                self._file.write(text)
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:  # a full disk, of which the system does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Nothing more is appended."""
        self._file.close()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A model's score on a task by a metric, and where it comes from.

    Attributes:
        task, metric, filter: of the harness, or of problems of one's own.
        score, stderr, n: a share of 1 where it is one, its standard error, the number of items.
        label: what tables call the model; `model`, `model_digest`: its name and a digest of its files.
        requested, task_digest: the task as it was asked for, and as it was then.
        benchmark, group: the suite's name for it, and the group that it is a part of.
        main: whether it is the task's first metric. higher_is_better: whether more of it is.
        shots, max_gen_toks, version, chat_template: how items were put.
        partial: whether only the first items were scored.
        rows: how many rows the scoring made, so that one that was cut off is known.
        settings: of the scoring.
        items: which items were right, for paired tests.
        step, seconds: of a student in training, and of the scoring.
        spent: what the student took (`data.spent`), where that is known.
        origin: commit, versions, hardware, seed and command.
        more: whatever else the file's row held.
    """

    task: str
    metric: str
    score: float
    n: int
    label: str
    model: str = ""
    model_digest: str = ""
    requested: str = ""
    task_digest: str = ""
    benchmark: str | None = None
    group: str | None = None
    filter: str = "none"
    main: bool = True
    stderr: float | None = None
    higher_is_better: bool = True
    shots: int | None = None
    max_gen_toks: int | None = None
    version: Any = None
    chat_template: bool = False
    partial: bool = False
    rows: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    items: dict[str, str] | None = None
    step: int | None = None
    seconds: float | None = None
    spent: dict[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`TASK/METRIC`."""
        return f"{self.task}/{self.metric}"

    @property
    def identity(self) -> str:
        """What a scoring is known by: the task as it was asked for and as it was then, the model's files, the settings."""
        model = self.model_digest or self.model
        return json.dumps([self.requested, self.task_digest, model, dict(self.settings)], sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """The row of a file."""
        stated = {member.name: getattr(self, member.name) for member in dataclasses.fields(self)}
        stated["settings"] = dict(self.settings)
        for optional in ("items", "step", "seconds", "spent"):
            if stated[optional] is None:
                del stated[optional]
        return {**stated.pop("more"), **stated.pop("origin"), **stated}

    @classmethod
    def from_json(cls, row: Any, where: str) -> ScoreRow:
        """A row of a file; `where` says which, for the message.

        Raises:
            ValueError: it is none.
        """
        missing = [name for name in _NEEDED if name not in (row if isinstance(row, dict) else {})]
        if missing:
            raise ValueError(f"{where} is no row of tsdkd evaluate: it has no {', '.join(sorted(missing))}.")
        known = {member.name for member in dataclasses.fields(cls)} - {"origin", "more"}
        own = {name: value for name, value in row.items() if name in known}
        origin = {name: row[name] for name in _ORIGIN if name in row}
        more = {name: value for name, value in row.items() if name not in known and name not in _ORIGIN}
        return cls(**own, origin=origin, more=more)


def read_scores(path: Path) -> list[ScoreRow]:
    """The scores of a file; a last line that was cut off is left out.

    Raises:
        ValueError: a line that is no score.
    """
    found = _numbered_rows(path, "remove it, that task is then scored again")
    return [ScoreRow.from_json(row, f"{path}, line {number}") for number, row in found]

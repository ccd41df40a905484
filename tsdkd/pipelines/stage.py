"""Stages: each reads files and writes one file or folder, and a rerun does only what has changed.

A stage's key is a hash of its settings and of its inputs' contents. Beside what it has made stands a `….stage.json` with key,
settings and a summary; while it works, rows are appended to `….part` one by one, so that an interruption loses the row in hand
at most. What a change of settings replaces is kept in `replaced/`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tsdkd.data import commits
from tsdkd.data.rows import RowFile, read_rows
from tsdkd.provenance import redacted

EVERY = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Planned:
    """What a stage would do.

    Attributes:
        calls: to models behind an API, or None where that depends on stages that are not made yet.
        cost: what they may cost, in the currency of the price list; None: no prices are known.
        said: the rest, in words.
    """

    calls: int | None = 0
    cost: float | None = None
    said: str = ""


class Work:
    """What a stage writes to while it works: rows, or files in a folder.

    Attributes:
        done: rows that an interrupted making left, by their `id`.
        folder: of a stage that makes a folder.
        counts: what came of it, by reason; the stage's summary.
    """

    def __init__(self, name: str, rows: RowFile | None, folder: Path | None, say: Callable[[str], None]) -> None:
        self.name, self.folder, self.say = name, folder, say
        self._rows = rows
        self.done = {row["id"]: row for row in (rows.rows if rows else [])}
        self.counts: dict[str, Any] = {}
        self._began = self._spoken = time.monotonic()
        self._base: int | None = None  # what was done when progress was told of first: no time went into it now

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, which has an `id` that no other has; one that is there already stays."""
        if row["id"] in self.done:
            return
        assert self._rows is not None
        self._rows.add(row)
        self.done[row["id"]] = dict(row)

    def count(self, reason: str, number: int | float = 1) -> None:
        """Add to a count of the summary."""
        self.counts[reason] = self.counts.get(reason, 0) + number

    def progress(self, done: int, of: int) -> None:
        """Say how far it is, and the time left, every now and then."""
        now = time.monotonic()
        if self._base is None:
            self._base, self._began = done, now
        if now - self._spoken < EVERY or done <= self._base:
            return
        self._spoken = now
        left = (now - self._began) / (done - self._base) * (of - done)
        self.say(f"{self.name}: {done:,} of {of:,}, {spoken_time(left)} left")


def spoken_time(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> spoken_time(48), spoken_time(600), spoken_time(9000)
        ('48 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(eq=False)
class Stage(abc.ABC):
    """A step of a pipeline.

    Args:
        name: of the stage and, behind its number, of its output.
        after: the stages whose outputs it reads.
        settings: what its output depends on beside those and `files`.
        files: further files that it reads.

    A subclass has `make`, and `plan` where it calls models; `is_folder` says what it writes.
    """

    name: str
    after: Sequence[Stage] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()
    is_folder = False
    is_together = False  # every process of `accelerate launch` takes part in making it
    columns: ClassVar[tuple[str, ...]] = ("id",)  # that each of its rows has
    output: Path = field(default=Path(), init=False)

    @abc.abstractmethod
    def make(self, work: Work) -> None:
        """Add the rows, or write the folder's files; whatever `work.done` holds is not made again."""

    def check(self) -> None:  # noqa: B027
        """Raise a ValueError of what `make` could not do; asked before any stage is made, so that nothing is spent in vain."""

    def plan(self) -> Planned:
        """What `make` would do, without doing it; stages before it may not have been made."""
        return Planned()

    def depends_on(self, what: str, name: str) -> None:
        """Have the key depend on a file's contents; of a folder, or a name elsewhere, on the name and on what is there."""
        path = Path(name).expanduser()
        if path.is_file():
            self.files = [*self.files, path]
        else:
            whose = f"{what}' files" if what.endswith("s") else f"{what}'s files"
            self.settings.update({what: name, whose: contents_of(name)})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What it made; none yet where it has not."""
        return read_rows(self.output, "remove it, it is then made again") if self.output.is_file() else []

    @property
    def about(self) -> dict[str, Any] | None:
        """Its `….stage.json`; None where it has not been made, or is not whole."""
        try:
            made = json.loads(about_path(self.output).read_text())
            return made if isinstance(made, dict) and made["digest"] == digest_of(self.output) else None
        except (OSError, ValueError, KeyError):
            return None

    @property
    def is_as_asked(self) -> bool:
        """Whether it is made, with the settings of now and of its inputs as they stand there."""
        about = self.about
        return about is not None and about["key"] == self.key

    @property
    def is_current(self) -> bool:
        """The same of it and of all stages before it."""
        return self.is_as_asked and all(before.is_current for before in self.after)

    @property
    def key(self) -> str:
        """Of its settings and its inputs as they are now."""
        inputs = [digest_of(stage.output) for stage in self.after] + [commits.digest_of(path) for path in self.files]
        text = json.dumps([self.name, redacted(self.settings), inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(path: Path) -> str:
    """Of a stage's file, or of its folder's manifest; empty where it is not there, or is not what the manifest says."""
    if path.is_dir():
        try:
            manifest = commits.read_manifest(path)
            written = (path / commits.MANIFEST).stat().st_mtime_ns
            for name, (size, digest) in manifest["files"].items():
                found = (path / name).stat()
                if found.st_size != size or (found.st_mtime_ns > written and commits.digest_of(path / name) != digest):
                    return ""
            return str(manifest["digest"])
        except (OSError, ValueError, KeyError):
            return ""
    return commits.digest_of(path) if path.is_file() else ""


_ENDS = 1 << 20  # bytes at both ends of a large file that tell it from another


def contents_of(name: str) -> str:
    """What tells a model's folder, or a file, from another in its place: names, sizes, and the bytes at both ends of each file;
    empty of what is not here."""
    path = Path(name).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    made = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        size = file.stat().st_size
        made.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            made.update(opened.read(_ENDS))
            opened.seek(max(0, size - _ENDS))
            made.update(opened.read())
    return made.hexdigest()[:16] if files else ""


def about_path(output: Path) -> Path:
    return output.parent / f"{output.name.removesuffix('.jsonl')}.stage.json"

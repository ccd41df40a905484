"""Scores laid out as the paper's tables, beside its own numbers: what is best, what is above the teacher, what is chance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from statistics import NormalDist
from typing import Any

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import ScoreRow
from tsdkd.data.spent import is_spent

TEACHER, STUDENT = "Teacher", "Student"
# What a run calls a method, and what the paper does.
_NAMES = {
    "seqkd": "Sequence-Level KD",
    "sequencekd": "Sequence-Level KD",
    "sequencelevelkd": "Sequence-Level KD",
    "supervisedkd": "Supervised-KD",
    "distillm": "DistiLLM",
    "speculativekd": "Speculative KD",
    "minillm": "MiniLLM",
    "gkd": "GKD",
    "tsdkd": "TSD-KD",
    "tsdkdadaptive": "TSD-KD (adaptive)",
    "tsdkdoffpolicy": "TSD-KD (off-policy)",
    "teacher": TEACHER,
    "student": STUDENT,
}
# What Table 3 calls the first and the last of its rows.
_IN_ABLATION = {"GKD": "GKD (no part)", "TSD-KD": "gate + indirect + entropy"}
LEVEL = 0.05


def paper() -> dict[str, Any]:
    """The paper's tables as `paper.json` transcribes them; 7 and 8 with the rows that they repeat."""
    tables = json.loads(files("tsdkd.evaluation").joinpath("paper.json").read_text())["tables"]
    for table in tables.values():
        if "like" in table:
            like = tables[table["like"]]
            table["rows"] = {**{name: row for name, row in like["rows"].items() if name != "TSD-KD"}, **table["rows"]}
    return tables


def name_in_paper(label: str) -> str:
    """What the paper calls a label, or the label.

    Example:
        >>> name_in_paper("tsd_kd"), name_in_paper("my-run")
        ('TSD-KD', 'my-run')
    """
    return _NAMES.get("".join(c for c in label.casefold() if c.isalnum()), label)


def mcnemar(right: str, other: str) -> float:
    """The exact two-sided p-value of McNemar's test on the same items (McNemar 1947), of strings of 1 and 0.

    Example:
        >>> round(mcnemar("1111100000", "0000000000"), 4)
        0.0625
    """
    if len(right) != len(other):
        raise ValueError(f"{len(right)} items are compared with {len(other)}: a paired test needs the same items.")
    gained = sum(a > b for a, b in zip(right, other, strict=True))
    lost = sum(a < b for a, b in zip(right, other, strict=True))
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def unpaired(difference: float, *variances: float) -> float:
    """The two-sided p-value of a difference of means by its standard error."""
    error = math.sqrt(sum(variances))
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return 2 * (1 - NormalDist().cdf(abs(difference) / error))


@dataclass(frozen=True)
class Cell:
    """A model's score on a benchmark, a share of 1 where it is one."""

    score: float
    stderr: float
    n: int
    partial: bool
    items: dict[str, str] | None
    higher_is_better: bool = True
    settings: tuple = ()
    spent: Mapping[str, Any] | None = None

    @property
    def is_share(self) -> bool:
        return 0 <= self.score <= 1 and self.higher_is_better

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %: Wilson's of a share of items, else by the standard error."""
        if self.is_share and self.n and 0 <= self.score <= 1:
            return wilson_interval(round(self.score * self.n), self.n)
        return self.score - 1.96 * self.stderr, self.score + 1.96 * self.stderr

    @property
    def merit(self) -> float:
        """The score, or less than nothing where less is better."""
        return self.score if self.higher_is_better else -self.score

    def __str__(self) -> str:
        return f"{100 * self.score:.1f}" if self.is_share else f"{self.score:.4g}"

    @classmethod
    def of(cls, row: ScoreRow) -> Cell:
        score, n = row.score, row.n
        stderr = row.stderr if row.stderr is not None else math.sqrt(max(score * (1 - score), 0.0) / max(n, 1))
        settings = (row.shots, row.settings.get("max_gen_toks"))
        spent = row.spent if is_spent(row.spent) else None
        return cls(score, stderr, n, row.partial, row.items, row.higher_is_better, settings, spent)

    def p_value(self, other: Cell) -> tuple[float, bool]:
        """That this one and `other` are the same, and whether the test is paired."""
        if self.items and other.items and self.items["set"] == other.items["set"]:
            return mcnemar(self.items["right"], other.items["right"]), True
        return unpaired(self.score - other.score, self.stderr**2, other.stderr**2), False


@dataclass(frozen=True)
class Table:
    """One layout with the scores that the rows reach.

    Args:
        number: of the paper's table; None for tasks that are in none.
        title: what it shows.
        columns: benchmarks.
        cells: by label and benchmark.
        published: the paper's numbers in percent, by label and benchmark.
        notes: where the paper contradicts itself.
    """

    number: str | None
    title: str
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    published: dict[tuple[str, str], float] = field(default_factory=dict)
    starred: set[tuple[str, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The rows' labels: teacher and student first, then as the paper has them, then the rest."""
        ours = list(dict.fromkeys(label for label, _ in self.cells))
        known = [TEACHER, STUDENT, *dict.fromkeys(label for label, _ in self.published)]
        return [*(label for label in dict.fromkeys(known) if label in ours), *(label for label in ours if label not in known)]

    @property
    def spent(self) -> dict[str, Mapping[str, Any]]:
        """What each label's student took, where its rows say it."""
        found = {label: cell.spent for (label, _), cell in self.cells.items() if cell.spent is not None}
        return {label: found[label] for label in self.labels if label in found}

    def comparable(self, label: str, column: str) -> Cell | None:
        """A cell that may be compared with its column: of all items, and with the settings that most of the column has."""
        cell = self.cells.get((label, column))
        whole = [c.settings for (_, name), c in self.cells.items() if name == column and not c.partial]
        if cell is None or cell.partial or cell.settings != max(whole, key=whole.count):
            return None
        return cell

    def average(self, label: str) -> float | None:
        """The mean of a label's shares over all columns; None where one is missing or is no share."""
        cells = [self.cells.get((label, column)) for column in self.columns]
        whole = [cell.score for cell in cells if cell is not None and cell.is_share and not cell.partial]
        return sum(whole) / len(whole) if len(whole) == len(self.columns) > 1 else None

    @property
    def averages(self) -> dict[str, str]:
        """Each label's average in percent as text, empty without one; nothing where no label has one."""
        found = {label: self.average(label) for label in self.labels}
        texts = {label: "" if value is None else f"{100 * value:.1f}" for label, value in found.items()}
        return texts if any(texts.values()) else {}

    def above_teacher(self, label: str, column: str) -> bool:
        """Whether a label's score is better than the teacher's."""
        cell, teacher = self.comparable(label, column), self.comparable(TEACHER, column)
        return cell is not None and teacher is not None and label != TEACHER and cell.merit > teacher.merit

    def ranked(self, column: str) -> tuple[set[str], set[str]]:
        """The best labels of a column and the runners-up, the teacher left out."""
        found = {label: self.comparable(label, column) for label in self.labels if label != TEACHER}
        scores = {label: cell.merit for label, cell in found.items() if cell is not None}
        if len(scores) < 2:
            return set(), set()
        first, *rest = sorted(set(scores.values()), reverse=True)
        best = {label for label, score in scores.items() if score == first}
        second = {label for label, score in scores.items() if rest and score == rest[0]} if len(best) == 1 else set()
        return best, second

    def against_student(self, label: str, column: str) -> tuple[float, bool] | None:
        """The p-value of a label's difference from the untrained student, and whether it is paired."""
        cell, student = self.comparable(label, column), self.comparable(STUDENT, column)
        if cell is None or student is None or label in (TEACHER, STUDENT):
            return None
        return cell.p_value(student)

    def against_paper(self, label: str, column: str) -> tuple[float, float] | None:
        """Our score less the paper's, in points, and the p-value, the paper's error taken as that of as many items."""
        cell, printed = self.cells.get((label, column)), self.published.get((label, column))
        if cell is None or printed is None:
            return None
        share = printed / 100
        difference = cell.score - share
        return 100 * difference, unpaired(difference, cell.stderr**2, share * (1 - share) / max(cell.n, 1))


def tables_of(rows: Iterable[ScoreRow], numbers: list[str] | None = None, **roles: str | None) -> dict[str, list[Table]]:
    """The tables that rows reach, by chat-template setting.

    Args:
        rows: of results files; of two of a label and task the later one stands, a whole one before a partial one.
        numbers: of the paper's tables; None takes those of the models that the rows name (Tables 1 and 2 where they name none
            of the paper's), and those whose labels stand in no other.
        roles: `teacher` and `student`, the labels that play them.

    Raises:
        ValueError: a table that the paper does not have, a role that no row plays.
    """
    published = paper()
    for number in numbers or []:
        if number not in published:
            raise ValueError(f"the paper has no table {number!r} of scores; it has: {', '.join(published)}.")
    kept: dict[bool, dict[tuple[str, str], Cell]] = {}
    names: list[str] = []
    in_paper, labels = {column for table in published.values() for column in table["columns"]}, set()
    players = {label: role for role, label in ((TEACHER, roles.get("teacher")), (STUDENT, roles.get("student"))) if label}
    for row in rows:
        labels.add(row.label)
        if not row.main or row.group is not None:
            continue
        label = players.get(row.label) or name_in_paper(row.label)
        names.append(str(row.model))
        cells = kept.setdefault(row.chat_template, {})
        key = (label, row.benchmark or row.task)
        if key not in cells or cells[key].partial or not row.partial:
            cells[key] = Cell.of(row)
    for label in players:
        if label not in labels:
            raise ValueError(f"no row has the label {label!r}; there are: {', '.join(sorted(labels))}.")
    made: dict[str, list[Table]] = {}
    for chat, cells in sorted(kept.items()):
        tables = []
        for number in numbers or _reached(published, names, {label for label, _ in cells}):
            table = published[number]
            columns = [column for column in table["columns"] if any(column == name for _, name in cells)]
            if columns:
                tables.append(_table(number, table, columns, cells))
        others = list(dict.fromkeys(name for _, name in cells if name not in in_paper))
        if others:
            here = {key: cell for key, cell in cells.items() if key[1] in others}
            tables.append(Table(None, "Tasks that are not in the paper", others, here))
        made["with chat template" if chat else "without chat template"] = tables
    return made


def _reached(published: dict[str, Any], models: list[str], labels: set[str]) -> list[str]:
    """The tables of the pair of models that the rows name, and those with a label that only they have."""
    named = " ".join(models).casefold()
    first = ["4"] if "gemma" in named else ["5"] if "qwen3" in named else ["1", "2"]
    common = {label for number in "12459" for label in published[number]["rows"]}
    own = {number: set(published[number]["rows"]) - common for number in "3678"}
    return [number for number in published if number in first or labels & own.get(number, set())]


def _table(number: str, printed: dict[str, Any], columns: list[str], cells: dict[tuple[str, str], Cell]) -> Table:
    published = {
        (label, column): value
        for label, row in printed["rows"].items()
        for column, value in zip(printed["columns"], row, strict=True)
    }
    here = {key: cell for key, cell in cells.items() if key[1] in columns}
    if number == "3":
        here = {(_IN_ABLATION.get(label, label), column): cell for (label, column), cell in here.items()}
    starred = {(label, column) for label, column in printed["starred"]}
    return Table(number, printed["title"], columns, here, published, starred, printed["notes"])

"""Several teachers as they are named: `{"math": MODEL, "code": {"model": MODEL, "placement": "server", "urls": […]}}`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsdkd.checks import Problem, check_choice
from tsdkd.data.prompts import columns_of, rows_named
from tsdkd.teachers.itself import SELF
from tsdkd.teachers.placing import PLACEMENTS

_KNOWN = ("model", "placement", "urls")
COLUMN = "teacher"


@dataclass(frozen=True)
class TeacherEntry:
    """One of several teachers.

    Args:
        model: a name, a folder or a model.
        placement, urls: as the options' `teacher_placement` and `teacher_urls`.
    """

    model: Any
    placement: str
    urls: tuple[str, ...] = ()

    def args_of(self, args: Any) -> Any:
        """The options as they are for this teacher."""
        own = copy.copy(args)
        own.teacher_placement, own.teacher_urls = self.placement, list(self.urls) or None
        return own


def entries_of(given: Mapping[str, Any], args: Any) -> dict[str, TeacherEntry]:
    """Teachers by name.

    Raises:
        ValueError: none, a name that is no text, or an entry that cannot work.
    """
    if not given:
        raise ValueError("teacher_model is an empty mapping: name at least one teacher.")
    made = {}
    for name, value in given.items():
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise ValueError(f"a teacher is called {name!r}: its name is a text without '/', as rows name it.")
        entry = dict(value) if isinstance(value, Mapping) else {"model": value}
        unknown = sorted(set(entry) - set(_KNOWN))
        if unknown or "model" not in entry:
            what = f"has no {', '.join(unknown)}" if unknown else "lacks its model"
            raise ValueError(f"the teacher {name} {what}; its fields are {', '.join(_KNOWN)}.")
        placement = entry.get("placement", "server" if entry.get("urls") else args.teacher_placement)
        check_choice(f"the placement of the teacher {name}", placement, PLACEMENTS)
        urls = entry.get("urls") or (args.teacher_urls if placement == "server" else None) or ()
        model = str(entry["model"]) if isinstance(entry["model"], os.PathLike) else entry["model"]
        if model == SELF:
            raise ValueError(f"the teacher {name} is {SELF!r}: a student that teaches itself is the only teacher.")
        made[name] = TeacherEntry(model, placement, tuple([urls] if isinstance(urls, str) else urls))
    return made


def weight_problems(weights: Any, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """What keeps teachers from being averaged.

    Args:
        weights: as they were given.
        names: the teachers; none of a run with one.
        columns: of each data set by its role.
    """
    if not isinstance(weights, Mapping) or set(weights) != set(names) or not names:
        told = ", ".join(names) if names else "there is one teacher"
        yield Problem(f"teacher_weights={weights!r}, and the teachers are: {told}", do="give a weight to each of several")
        return
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            yield Problem(
                f"the teacher {name} has the weight {weight!r}", do="give a number above 0, or leave that teacher out"
            )
    for role, given in columns.items():
        if COLUMN in given:
            yield Problem(
                f"{role} has a column {COLUMN!r}, and teacher_weights have every teacher read every row",
                do="leave one of them out",
            )


def named_teachers(rows: Sequence[Mapping[str, Any]], names: Sequence[str], default: str | None) -> list[str]:
    """The name of each row's teacher.

    Raises:
        ValueError: a row that names none, or one that there is not.
    """
    found = [row.get(COLUMN) or default for row in rows]
    for name in found:
        if name not in names:
            raise ValueError(
                f"a row arrived whose teacher is {name!r}; there are: {', '.join(names)}. Name one of them, or set "
                "default_teacher."
            )
    return [str(name) for name in found]


def teacher_problems(dataset: Any, role: str, names: Sequence[str], default: str | None) -> Iterator[Problem]:
    """Rows whose teacher is not there, by their numbers."""
    if not hasattr(dataset, "__len__"):
        return
    do = f"name one of {', '.join(names)} in a column {COLUMN!r}, or set default_teacher"
    if COLUMN not in columns_of(dataset):
        if default is None:
            yield Problem(f"there are several teachers ({', '.join(names)}), and {role} has no column {COLUMN!r}", do=do)
        return
    wrong: dict[Any, list[int]] = {}
    for number, name in enumerate(dataset[COLUMN]):
        if (name or default) not in names:
            wrong.setdefault(name, []).append(number)
    for name, rows in wrong.items():
        yield Problem(f"the teacher of {rows_named(rows)} of {role} is {name!r}, and there is none of that name", do=do)

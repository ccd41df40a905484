"""The token page: what a method decides of every token of some completions, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tsdkd.reporting.pages import in_script, page

# What the page can work out from the rest.
_LEFT_OUT = ("method", "student", "teacher", "meanings")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def token_page(completions: Sequence[Sequence[Mapping[str, Any]]], title: str = "", origin: str = "") -> str:
    """The page of some completions.

    Args:
        completions: for each one or more tables of the same tokens (`TokenTable.to_json()`), which stand side by side.
        title, origin: what it shows and where it comes from.

    Raises:
        ValueError: no completion, or tables of different tokens side by side.
    """
    if not completions or not all(completions):
        raise ValueError("there is no completion to show: pass a list of tables for each.")
    for number, views in enumerate(completions):
        if any(view["token_ids"] != views[0]["token_ids"] for view in views):
            raise ValueError(f"completion {number} has tables of different tokens side by side: read the same text by both.")
    first = completions[0][0]
    against = f" against {first['teacher']}" if first["teacher"] else ""
    meanings = {name: told for views in completions for view in views for name, told in view["meanings"].items()}
    texts = {int(id): text for views in completions for view in views for id, text in view["candidates"]["texts"].items()}
    places = {id: place for place, id in enumerate(sorted(texts))}
    steps = [id - before for before, id in zip([0, *places], places, strict=False)]
    slim = [[_slim(view, places) for view in views] for views in completions]
    data = {"completions": slim, "meanings": meanings, "ids": steps, "texts": [texts[id] for id in places]}
    return page(
        "token_page",
        title=title or f"{first['method']}: {first['student']}{against}",
        origin=origin,
        completions=completions,
        data=in_script(data),
    )


def _slim(view: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """A table as the page needs it: numbers to 1e-7, probabilities of candidates to three digits, ids as their places."""
    made = {key: value for key, value in view.items() if key not in _LEFT_OUT}
    made["columns"] = {
        name: [value if value is None or isinstance(value, int) else _short(round(value, 7)) for value in values]
        for name, values in view["columns"].items()
        if name != "log_ratio"
    }
    candidates = {name: value for name, value in view["candidates"].items() if name != "texts"}
    candidates["ids"] = [[places[id] for id in row] for row in candidates["ids"]]
    for name in ("student", "teacher"):
        if candidates[name] is not None:
            candidates[name] = [[None if p is None else _short(float(f"{p:.3g}")) for p in row] for row in candidates[name]]
    ranks = candidates["teacher_ranks"]
    if ranks is not None and all(len(row) <= len(_DIGITS) for row in ranks):
        candidates["teacher_ranks"] = ["".join(_DIGITS[rank] for rank in row) for row in ranks]
    if candidates["teacher_best_prob"] is not None:
        candidates["teacher_best_prob"] = [
            None if p is None else _short(float(f"{p:.3g}")) for p in candidates["teacher_best_prob"]
        ]
    made["candidates"] = candidates
    return made


def _short(value: float) -> float | int:
    """A whole number without its point."""
    return int(value) if value == int(value) else value

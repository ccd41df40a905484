"""Rows with pictures of PIL's in them, as people write them in a list: the pictures go into columns of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("image", "images")


def has_picture(value: Any) -> bool:
    """Whether a value is a picture, or holds one."""
    if isinstance(value, dict):
        return any(map(has_picture, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_picture, value))
    return hasattr(value, "getbands") and hasattr(value, "tobytes")


def taken_out(rows: Sequence[dict[str, Any]], source: str) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Rows without their pictures, whose places in chats stay, and columns of the pictures, in their order.

    Raises:
        ValueError: a row with pictures in its prompt and in a column.
    """
    made = []
    for number, row in enumerate(rows):
        own, found = dict(row), list[Any]()
        if isinstance(row.get("prompt"), (list, tuple)):
            own["prompt"] = [_without(turn, found) for turn in row["prompt"]]
        if found and (row.get("image") is not None or row.get("images")):
            raise ValueError(f"row {number} of {source} has images in its prompt and in a column: leave one of them out.")
        if found:
            own["images"] = found
        made.append(own)
    columns = {name: [row.get(name) for row in made] for name in NAMES if any(row.get(name) for row in made)}
    return [{name: value for name, value in row.items() if name not in columns} for row in made], columns


def with_columns(rows: Any, columns: Mapping[str, list[Any]]) -> Any:
    """A data set with these columns of pictures beside its own."""
    from datasets import Dataset, Features, Image, List, concatenate_datasets

    made = [rows]
    for name, values in columns.items():
        kind = Image() if name == "image" else List(Image())
        given = values if name == "image" else [list(value or []) for value in values]
        made.append(Dataset.from_dict({name: given}, features=Features({name: kind})))
    return concatenate_datasets(made, axis=1)


def _without(turn: Any, found: list[Any]) -> Any:
    """A turn with its pictures taken out, into `found`."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), (list, tuple)):
        return turn
    parts = []
    for part in turn["content"]:
        if isinstance(part, dict) and part.get("type") == "image" and part.get("image") is not None:
            found.append(part["image"])
            part = {name: value for name, value in part.items() if name != "image"}
        parts.append(part)
    return {**turn, "content": parts}

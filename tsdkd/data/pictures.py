"""Rows with pictures of PIL's in them, as people write them in a list: the pictures go into columns of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("image", "images")


def has_picture(value: Any) -> bool:
    """Whether a value is a picture, or holds one, or a chat's part that is one by its path."""
    if isinstance(value, dict):
        if value.get("type") == "image" and value.get("image") is not None:
            return True
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
    if any(_in_parts(row.get("prompt")) for row in made):  # all alike, which a column has to be
        columns["prompt"] = [_of_parts(row.get("prompt")) for row in made]
    return [{name: value for name, value in row.items() if name not in columns} for row in made], columns


def with_columns(rows: Any, columns: Mapping[str, list[Any]]) -> Any:
    """A data set with these columns of pictures beside its own."""
    from datasets import Dataset, Features, Image, List, concatenate_datasets

    made = [rows]
    for name, values in columns.items():
        if name == "prompt":
            made.append(Dataset.from_dict({name: values}))
            continue
        kind = Image() if name == "image" else List(Image())
        given = values if name == "image" else [list(value or []) for value in values]
        made.append(Dataset.from_dict({name: given}, features=Features({name: kind})))
    return concatenate_datasets(made, axis=1)


def _in_parts(prompt: Any) -> bool:
    """Whether a chat has a turn whose content is in parts."""
    turns = prompt if isinstance(prompt, (list, tuple)) else ()
    return any(isinstance(turn, dict) and isinstance(turn.get("content"), (list, tuple)) for turn in turns)


def _of_parts(prompt: Any) -> Any:
    """A chat with every content in parts; what is no chat as it is."""
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(turn, dict) for turn in prompt):
        return prompt
    parts = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content  # noqa: E731
    return [{**turn, "content": parts(turn.get("content"))} for turn in prompt]


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

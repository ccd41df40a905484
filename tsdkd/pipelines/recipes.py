"""Configurations from the mappings of YAML files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any


def refuse_fields(config: Any, given: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse fields that a configuration has not, and a recipe without those that it needs.

    Raises:
        ValueError: naming them.
    """
    known = [member.name for member in fields(config)]
    unknown = sorted(set(given) - set(known))
    missing = [name for name in needed if not given.get(name)]
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(unknown)}; there are: {', '.join(known)}.")
    if missing:
        raise ValueError(f"the recipe lacks {', '.join(missing)}.")


def part_of(name: str, part: Any, given: Any) -> Any:
    """A part of a configuration from the mapping of a YAML file.

    Raises:
        ValueError: it is none, or has unknown fields.
    """
    known = [member.name for member in fields(part)]
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is a mapping with {', '.join(known)}, not {given!r}.")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}; there are: {', '.join(known)}.")
    return part(**given)

"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: `"green"`, `"yellow"` (look at it) or `"red"` (do not start).
        name: what was looked at.
        said: what was found, with its numbers.
        do: what to do about it; empty where nothing is.
    """

    level: str
    name: str
    said: str
    do: str = ""

"""Rows that a chat template does not take, by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

_UNRENDERED = (TemplateError, ValueError, TypeError, KeyError)  # of a chat that a template does not take


def row_by_row(function: Callable[[list], list], rows: list[dict[str, Any]], first: int, what: str) -> list:
    """`function(rows)`; where it fails, the number of the row that it fails for, `first` on, goes into `what`.

    Raises:
        ValueError: `what`, and why.
    """
    try:
        return function(rows)
    except _UNRENDERED:
        for number, row in enumerate(rows, first):
            try:
                function([row])
            except _UNRENDERED as error:
                raise ValueError(
                    f"{what.format(number)} ({error}). Remove or change what it does not take (a system role?), or set another "
                    "template."
                ) from error
        raise

"""What a student has taken, as files and tables say it: tokens trained on, FLOPs by part, seconds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsdkd.costs import PARTS

SPENT = "spent.json"
# The columns of a table; FLOPs as a whole, and their parts.
COSTS = ("trained tokens", "TFLOP", f"of {', '.join(PARTS)}", "seconds")


def is_spent(found: Any) -> bool:
    """Whether a mapping says what a student has taken: `trained_tokens`, `flops` by part, `seconds`."""
    if not isinstance(found, Mapping) or not isinstance(found.get("flops"), Mapping):
        return False
    values = [found.get("trained_tokens"), found.get("seconds"), *found["flops"].values()]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < math.inf for v in values)


def read_spent(folder: Path | str) -> dict[str, Any] | None:
    """What the student in a folder has taken; None where it is not said."""
    try:
        found = json.loads((Path(folder) / SPENT).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if is_spent(found) else None


def mean_spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several rows; a part that one of them lacks is none of the mean's."""
    flops = [row.get("flops") or {} for row in rows]
    whole = [part for part in PARTS if any(part in own for own in flops)] if all(flops) else []
    return {
        "trained_tokens": statistics.fmean(row["trained_tokens"] for row in rows),
        "flops": {part: statistics.fmean(own.get(part, 0.0) for own in flops) for part in whole},
        "seconds": statistics.fmean(row["seconds"] for row in rows),
    }


def costs_of(spent: Mapping[str, Any] | None) -> dict[str, str]:
    """The cells of `COSTS`; empty ones where it is not said.

    Example:
        >>> list(costs_of({"trained_tokens": 1200, "flops": {"rollout": 1e12, "loss": 2.5e12}, "seconds": 7.2}).values())
        ['1,200', '3.5', '1, 0, 0, 2.5', '7']
    """
    if spent is None:
        return dict.fromkeys(COSTS, "")
    flops = spent.get("flops") or {}  # a row of an earlier version says none
    parts = [flops.get(part, 0.0) / 1e12 for part in PARTS]
    told = (f"{sum(parts):.3g}", ", ".join(f"{count:.3g}" for count in parts)) if flops else ("", "")
    return dict(zip(COSTS, (f"{spent['trained_tokens']:,.0f}", *told, f"{spent['seconds']:.0f}"), strict=True))

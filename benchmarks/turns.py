"""What the benchmarks share: runs turn by turn, their ratios, and what is said of one that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, turn by turn; the first warms up."""
    made = [{name: run() for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: [turn[name] for turn in made] for name in runs}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def failure(error: BaseException) -> str:
    """Its kind and its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"

"""What `word_problems.yaml` calls."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from tsdkd.data.answers import is_correct
from tsdkd.demo.problems import held_out
from tsdkd.demo.run import HELD_OUT_SEED, LEVELS


def held_out_problems(**_: Any) -> dict[str, Dataset]:
    """The thousand problems that the demo scores on."""
    problems = held_out(1000, HELD_OUT_SEED, set(), LEVELS)
    return {"test": Dataset.from_list([{"question": p.question, "answer": p.answer} for p in problems])}


def grade(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 or 0 for a response."""
    return {"accuracy": float(is_correct(results[0], doc["answer"]))}

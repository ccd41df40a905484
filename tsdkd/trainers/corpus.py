"""A corpus beside the answers: the texts of a language-model loss that keeps what the student knew."""

from __future__ import annotations

import random
from typing import Any

from tsdkd.methods import Method


class Corpus:
    """The texts of a method's pretraining loss.

    Args:
        dataset: rows with a `text`.
        method: one with `pretraining_weight` and `pretraining_loss`.
        seed: of the draws.
    """

    def __init__(self, dataset: Any, method: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.weight, self.loss = method.pretraining_weight, method.pretraining_loss

    @classmethod
    def of(cls, dataset: Any, method: Method, seed: int) -> Corpus | None:
        """The corpus, or None for a method without such a loss.

        Raises:
            ValueError: a weight without a corpus, a corpus without a weight or without a `text` column.
        """
        weight = getattr(method, "pretraining_weight", 0.0)
        if not weight and dataset is not None:
            raise ValueError(
                f"pretraining_dataset was given to {method.name}, whose pretraining_weight is 0 or missing: nothing would be "
                "trained on it. Set minillm's pretraining_weight, or leave the data set out."
            )
        if weight and (dataset is None or "text" not in (dataset.column_names or [])):
            columns = "none was given" if dataset is None else f"it has: {', '.join(dataset.column_names or [])}"
            raise ValueError(
                f"pretraining_weight={weight} takes a pretraining_dataset with a 'text' column; {columns}. Pass one, or set "
                "the weight to 0."
            )
        return cls(dataset, method, seed) if weight else None

    def draw(self, rows: int, step: int, process: int) -> list[str]:
        """Texts for a step, drawn by the seed, the step and the process."""
        lot = random.Random(f"{self.seed}/{step}/{process}")
        return [self.dataset[lot.randrange(len(self.dataset))]["text"] for _ in range(rows)]

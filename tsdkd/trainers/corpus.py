"""A corpus beside the completions: the texts of a language-model loss that keeps what the student knew."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


class Corpus:
    """The texts of a method's pretraining loss.

    Args:
        dataset: rows with a `text`.
        seed: of the draws.
        longest: ids of a text at most; the rest of it is not read.
    """

    def __init__(self, dataset: Any, seed: int, longest: int) -> None:
        self.dataset, self.seed, self.longest = dataset, seed, longest

    def draw(self, rows: int, step: int, process: int) -> list[str]:
        """Texts for a step, drawn by the seed, the step and the process."""
        lot = random.Random(f"{self.seed}/{step}/{process}")
        return [self.dataset[lot.randrange(len(self.dataset))]["text"] for _ in range(rows)]

    def ids(self, texts: list[str], tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """Their ids, cut to the context; a text of one token predicts nothing and is left empty."""
        cut = [row[: self.longest] for row in tokenize(texts)]
        return [row if len(row) > 1 else [] for row in cut]

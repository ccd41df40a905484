"""Selections: which tokens of a completion a term takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsdkd.checks import check_share
from tsdkd.selection.masks import highest, kept, opener_mask, top_count, top_entropy_mask
from tsdkd.types import TokenStatistics


@dataclass(frozen=True)
class Opener:
    """`opener_mask` as a rule; with the student's statistics known, the teacher need not read what follows it."""

    share: float = 0.1
    needs = "student"
    is_prefix = True

    def __post_init__(self) -> None:
        check_share("opener_entropy_share", self.share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        return opener_mask(statistics.student_entropy, statistics.mask, self.share)


@dataclass(frozen=True)
class TopEntropy:
    """`top_entropy_mask` as a rule; how many tokens it keeps is known from lengths alone."""

    fraction: float = 0.1
    needs = "student"

    def __post_init__(self) -> None:
        check_share("top_entropy_fraction", self.fraction)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        return top_entropy_mask(statistics.student_entropy, statistics.mask, self.fraction)

    def count(self, length: int) -> int:
        """How many of a completion's tokens are kept."""
        return top_count(length, self.fraction)


@dataclass(frozen=True)
class Prefix:
    """The first ⌈s·L⌉ tokens of each completion; the models need not read the rest."""

    share: float = 0.5
    needs = "lengths"
    is_prefix = True

    def __post_init__(self) -> None:
        check_share("selection_share", self.share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        mask = statistics.mask
        return mask & (mask.cumsum(-1) <= kept(mask, self.share))

    def count(self, length: int) -> int:
        return top_count(length, self.share)

    def prefix_length(self, length: int) -> int:
        """How many of a completion's first tokens have to be scored at all."""
        return self.count(length)


@dataclass(frozen=True)
class RandomTokens:
    """⌈s·L⌉ tokens of each completion by a draw that depends on the seed and the completion's number alone."""

    share: float = 0.5
    seed: int = 0
    needs = "lengths"

    def __post_init__(self) -> None:
        check_share("selection_share", self.share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        mask = statistics.mask
        rows = range(len(mask)) if statistics.rows is None else statistics.rows
        # A token's lot is a function of (seed, row, position): no batching and no length of the batch changes it.
        lots = [torch.rand(mask.shape[-1], generator=self._generator(row), dtype=torch.float64) for row in rows]
        drawn = torch.stack(lots).to(mask.device) if lots else torch.zeros(mask.shape, dtype=torch.float64)
        return highest(drawn, mask, kept(mask, self.share))

    def _generator(self, row: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + row) % (1 << 63))

    def count(self, length: int) -> int:
        return top_count(length, self.share)


@dataclass(frozen=True)
class EntropyOrDivergence:
    """The top ρ_H of a completion by student entropy, and of the rest the top ρ_D by divergence.

    A hard rule of ours for the two regions that TIP (arXiv 2604.14084) finds signal in; TIP itself ranks by a soft union
    of normalised scores.
    """

    entropy_share: float = 0.25
    divergence_share: float = 0.25
    needs = "both"

    def __post_init__(self) -> None:
        check_share("entropy_share", self.entropy_share)
        check_share("divergence_share", self.divergence_share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        assert statistics.divergence is not None
        mask = statistics.mask
        uncertain = highest(statistics.student_entropy, mask, kept(mask, self.entropy_share))
        return uncertain | highest(statistics.divergence, mask & ~uncertain, kept(mask, self.divergence_share))

    def count(self, length: int) -> int:
        uncertain = top_count(length, self.entropy_share)
        return uncertain + min(top_count(length, self.divergence_share), length - uncertain)

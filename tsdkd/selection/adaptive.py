"""The opener's share chosen by each completion's difficulty (appendix A.7, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.checks import check_count, check_share
from tsdkd.selection.masks import opener_mask
from tsdkd.types import TokenStatistics


@dataclass(frozen=True)
class AdaptiveOpener:
    """How the opener's share follows a completion's difficulty; the history that it reads is an `OpenerHistory`.

    Difficulty `d = mean_t H_S − mean_t H_T`; smoothed `d̄`: the mean of `d` and the last `smoothing − 1` raw
    difficulties. The share is that of the quantile interval of the last `window` smoothed values in which `d̄` falls;
    `d̄` equal to an edge belongs to the lower interval. Below `warmup` values the fixed share is used.

    Args:
        edges: quantiles between the intervals, rising, in (0, 1); the paper's table is not in its text.
        shares: one per interval, in [0, 1].
        fixed_share: c while the history is short.
        window, warmup, smoothing: how many values the history keeps, needs, and smooths over.

    Raises:
        ValueError: edges and shares that make no intervals, or a number outside its range.
    """

    edges: tuple[float, ...] = (0.25, 0.5, 0.75)
    shares: tuple[float, ...] = (0.05, 0.10, 0.15, 0.20)
    fixed_share: float = 0.1
    window: int = 256
    warmup: int = 20
    smoothing: int = 5

    def __post_init__(self) -> None:
        for name in ("edges", "shares"):  # lists come from YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError(
                f"{len(self.edges)} quantile edges make {len(self.edges) + 1} intervals but {len(self.shares)} shares were "
                "given: pass one share per interval."
            )
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < edge < 1 for edge in self.edges):
            raise ValueError(f"edges={self.edges}: quantiles between intervals must rise and lie in (0, 1).")
        for share in (*self.shares, self.fixed_share):
            check_share("shares", share)
        for name, smallest in (("window", 1), ("warmup", 0), ("smoothing", 1)):
            check_count(name, getattr(self, name), smallest=smallest)


class OpenerHistory:
    """The difficulties of a run so far, and the opener that they choose; a selection of the ranking term.

    `shares_for` reads a frozen history, so a step's completions do not depend on its batching; `append` extends it after
    the step, in the order of the rollouts.

    Args:
        options: how a share follows from them.
    """

    needs = "both"

    def __init__(self, options: AdaptiveOpener) -> None:
        self.options = options
        self.raw: list[float] = []
        self.smoothed: list[float] = []

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        shares = self._shares(self.difficulty(statistics))
        return opener_mask(statistics.student_entropy, statistics.mask, shares.unsqueeze(-1))

    @staticmethod
    def difficulty(statistics: TokenStatistics) -> torch.Tensor:
        """`[completions]`, float64: mean H_S − mean H_T of each completion."""
        assert statistics.teacher_entropy is not None
        gap = torch.where(statistics.mask, (statistics.student_entropy - statistics.teacher_entropy).double(), 0.0)
        return gap.sum(-1) / statistics.mask.sum(-1).clamp(min=1)

    def _smooth(self, difficulty: Any) -> Any:
        return (sum(self.raw) + difficulty) / (len(self.raw) + 1)  # the history keeps the last smoothing − 1

    def _shares(self, difficulties: torch.Tensor) -> torch.Tensor:
        options = self.options
        if len(self.smoothed) < max(1, options.warmup):
            return torch.full_like(difficulties, options.fixed_share)
        history = torch.tensor(self.smoothed, dtype=torch.float64)
        bounds = torch.quantile(history, torch.tensor(options.edges, dtype=torch.float64)).to(difficulties.device)
        interval = (self._smooth(difficulties).unsqueeze(-1) > bounds).sum(-1)
        return torch.tensor(options.shares, dtype=torch.float64, device=difficulties.device)[interval]

    def shares_for(self, difficulties: Sequence[float]) -> list[float]:
        """The opener's share for each completion of a step, from the history before it."""
        return self._shares(torch.tensor(list(difficulties), dtype=torch.float64)).tolist()

    def append(self, difficulties: Sequence[float]) -> None:
        """Extend the history by a step's difficulties, in the order of the rollouts; each is smoothed as it was judged."""
        options = self.options
        self.smoothed += [self._smooth(difficulty) for difficulty in difficulties]
        self.raw += difficulties
        self.smoothed = self.smoothed[-options.window :]
        self.raw = self.raw[-(options.smoothing - 1) :] if options.smoothing > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"raw": list(self.raw), "smoothed": list(self.smoothed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's history."""
        self.raw, self.smoothed = list(state["raw"]), list(state["smoothed"])

"""Which tokens the terms take: from per-token statistics to masks and weights, without gradient.

Two kinds of rule. A **gate** reads one token's own statistics and weighs the direct term there. A **selection** reads a
response's statistics and keeps some of its tokens. A rule says with `needs` what it reads: `"lengths"` (no statistics),
`"token"` (its own row), `"student"` (the student's statistics of the response) or `"both"`; a selection that says nothing
may read both. A selection whose size lengths alone tell has `count(length)`. Any function of `TokenStatistics` is a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tsdkd.checks import check_choice, check_positive, check_share
from tsdkd.types import TokenStatistics

# A share of a length, as the paper's ceil(ρ·L), but 0.07 · 100 is 7 and not 8.
_CEIL_SLACK = 1e-9


def top_count(length: int, fraction: float) -> int:
    """ceil(ρ·L), how many of a response's `length` tokens are selected.

    Example:
        >>> top_count(100, 0.07), top_count(3, 0.1), top_count(0, 0.1)
        (7, 1, 0)
    """
    return math.ceil(fraction * length - _CEIL_SLACK)


def opener_mask(
    student_entropy: torch.Tensor, mask: torch.Tensor, opener_entropy_share: float | torch.Tensor = 0.1
) -> torch.Tensor:
    """The opener of each response: its first tokens, up to a share of the response's whole entropy.

    Formula: the first `n` trained tokens, `n` the smallest with `Σ_{t≤n} H_S(t) ≥ c · Σ_{t≤L} H_S(t)`; the crossing
    token is in. Sums run in float64.

    Args:
        student_entropy: `[responses, longest]`, nats.
        mask: `[responses, longest]` bool, True where a trained token stands.
        opener_entropy_share: c in [0, 1]; 0 selects nothing (the term is off), 1 everything up to the last uncertain
            token. A tensor `[responses, 1]` gives each response its own.

    Returns:
        `[responses, longest]` bool.

    Raises:
        ValueError: a share outside [0, 1].

    Example:
        >>> opener_mask(torch.tensor([[1.0, 3.0, 6.0, 0.0]]), torch.ones(1, 4).bool(), 0.4).tolist()
        [[True, True, False, False]]

    References:
        TSD-KD section 3.1, Algorithm 1.
    """
    if not isinstance(opener_entropy_share, torch.Tensor):
        check_share("opener_entropy_share", opener_entropy_share)
        if opener_entropy_share == 0.0:
            return torch.zeros_like(mask)
    if mask.shape[-1] == 0:
        return torch.zeros_like(mask)
    entropy = torch.where(mask, student_entropy.detach().double(), 0.0)
    cumulative = entropy.cumsum(-1)
    reached = (cumulative < opener_entropy_share * cumulative[..., -1:]) & mask
    # n = min(L, 1 + #{t : cumsum_t < c · cumsum_L}); a token is in if fewer than n trained tokens stand before it.
    before = mask.cumsum(-1) - mask.long()
    return mask & (before <= reached.sum(-1, keepdim=True))


def top_entropy_mask(student_entropy: torch.Tensor, mask: torch.Tensor, top_entropy_fraction: float = 0.1) -> torch.Tensor:
    """The tokens of each response where the student is least certain; of equal entropies the earlier token.

    Args:
        student_entropy: `[responses, longest]`, nats.
        mask: `[responses, longest]` bool, True where a trained token stands.
        top_entropy_fraction: ρ in [0, 1]; ceil(ρ·L) tokens of a response of L are kept, 0 selects nothing.

    Returns:
        `[responses, longest]` bool.

    Raises:
        ValueError: a fraction outside [0, 1].

    Example:
        >>> top_entropy_mask(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.ones(1, 4).bool(), 0.25).tolist()
        [[False, True, False, False]]

    References:
        TSD-KD Eq. 12.
    """
    check_share("top_entropy_fraction", top_entropy_fraction)
    return _highest(student_entropy, mask, _kept(mask, top_entropy_fraction))


def _kept(mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """`top_count` of each response, `[responses, 1]`."""
    return (fraction * mask.sum(-1, keepdim=True).double() - _CEIL_SLACK).ceil()


def _highest(values: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The `kept` `[responses, 1]` highest values of each response, of equal ones the earlier."""
    ranked = torch.where(mask, values.detach().double(), -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(mask.shape[-1], device=mask.device).expand_as(order))
    return mask & (rank < kept)


def entropy_gap_gate(student_entropy: torch.Tensor, teacher_entropy: torch.Tensor, gate_sharpness: float = 1.0) -> torch.Tensor:
    """The weight of the direct term: high where the student is uncertain and the teacher is not.

    Formula: `w = sigmoid(γ · (H_S − H_T))`, without gradient.

    Args:
        student_entropy, teacher_entropy: nats, equal shapes.
        gate_sharpness: γ, above 0; the paper gives none, 1 is its released code's.

    Returns:
        weights in (0, 1), 0.5 where both are equally certain.

    Example:
        >>> entropy_gap_gate(torch.tensor([2.0]), torch.tensor([2.0])).tolist()
        [0.5]

    References:
        TSD-KD Eq. 11.
    """
    check_positive("gate_sharpness", gate_sharpness)
    return torch.sigmoid(gate_sharpness * (student_entropy - teacher_entropy)).detach()


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
        """How many of a response's tokens are kept."""
        return top_count(length, self.fraction)


@dataclass(frozen=True)
class EntropyGapGate:
    """`entropy_gap_gate` as a rule."""

    sharpness: float = 1.0
    needs = "token"

    def __post_init__(self) -> None:
        check_positive("gate_sharpness", self.sharpness)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        assert statistics.teacher_entropy is not None, "a gate is asked after both heads were projected"
        return entropy_gap_gate(statistics.student_entropy, statistics.teacher_entropy, self.sharpness)


@dataclass(frozen=True)
class DivergenceAwareGate:
    """A gate that stays open where both models are certain of different tokens: `1 − (1 − w_t) · exp(−D_t)`.

    `w_t` is the entropy-gap gate, `D_t` the token's unweighted divergence. A soft rule of ours, in the spirit of TIP
    (arXiv 2604.14084): what carries signal is high student entropy, or low entropy with high divergence.
    """

    sharpness: float = 1.0
    needs = "token"

    def __post_init__(self) -> None:
        check_positive("gate_sharpness", self.sharpness)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        assert statistics.divergence is not None, "a gate is asked after both heads were projected"
        return 1.0 - (1.0 - EntropyGapGate(self.sharpness)(statistics)) * (-statistics.divergence).exp()


@dataclass(frozen=True)
class Prefix:
    """The first ⌈s·L⌉ tokens of each response; the models need not read the rest."""

    share: float = 0.5
    needs = "lengths"

    def __post_init__(self) -> None:
        check_share("selection_share", self.share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        mask = statistics.mask
        return mask & (mask.cumsum(-1) <= _kept(mask, self.share))

    def count(self, length: int) -> int:
        return top_count(length, self.share)

    def reads(self, length: int) -> int:
        """How many of a response's first tokens have to be scored at all."""
        return self.count(length)


@dataclass(frozen=True)
class RandomTokens:
    """⌈s·L⌉ tokens of each response by a draw that depends on the seed and the response's number alone."""

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
        return _highest(drawn, mask, _kept(mask, self.share))

    def _generator(self, row: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + row) % (1 << 63))

    def count(self, length: int) -> int:
        return top_count(length, self.share)


@dataclass(frozen=True)
class EntropyOrDivergence:
    """The top ρ_H of a response by student entropy, and of the rest the top ρ_D by divergence.

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
        uncertain = _highest(statistics.student_entropy, mask, _kept(mask, self.entropy_share))
        return uncertain | _highest(statistics.divergence, mask & ~uncertain, _kept(mask, self.divergence_share))

    def count(self, length: int) -> int:
        uncertain = top_count(length, self.entropy_share)
        return uncertain + min(top_count(length, self.divergence_share), length - uncertain)


Gate = Callable[[TokenStatistics], torch.Tensor]
Selection = Callable[[TokenStatistics], torch.Tensor]
GATES: dict[str, Callable[[float], Gate | None]] = {
    "none": lambda sharpness: None,
    "entropy_gap": EntropyGapGate,
    "divergence_aware": DivergenceAwareGate,
}
SELECTIONS: dict[str, Callable[[float], Selection | None]] = {
    "none": lambda share: None,
    "opener": Opener,
    "top_entropy": TopEntropy,
    "entropy_or_divergence": lambda share: EntropyOrDivergence(share / 2, share / 2),
    "random": RandomTokens,
    "prefix": Prefix,
}


def resolve_gate(gate: str | Gate | None, gate_sharpness: float = 1.0) -> Gate | None:
    """A gate from its name or from a function of `TokenStatistics`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if gate is None or callable(gate):
        return gate
    check_choice("gate", gate, GATES)
    return GATES[gate](gate_sharpness)


def resolve_selection(selection: str | Selection | None, share: float = 0.5) -> Selection | None:
    """A selection of the direct term from its name and share, or from a function of `TokenStatistics`.

    Args:
        selection: a name in `SELECTIONS`, a function that returns a bool mask `[responses, longest]`, or None for all.
        share: of a response's tokens (`"opener"`: of its entropy; `"entropy_or_divergence"`: half to each region).

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a share outside [0, 1].
    """
    check_share("selection_share", share)
    if selection is None or callable(selection):
        return selection
    check_choice("selection", selection, SELECTIONS)
    return SELECTIONS[selection](share)


def counted(selection: Selection | None) -> bool:
    """Whether the lengths of the responses tell how many tokens a selection keeps."""
    return selection is None or hasattr(selection, "count")


def direct_count(selection: Selection | None, lengths: Sequence[int]) -> int:
    """What a direct term on selected tokens is divided by.

    Their number where lengths tell it; else the number of responses with a token, each giving the mean over its own
    selected tokens: so it is exact whatever the batching.
    """
    if selection is None:
        return sum(lengths)
    count = getattr(selection, "count", None)
    return sum(length > 0 for length in lengths) if count is None else sum(count(length) for length in lengths)


@dataclass
class AdaptiveOpener:
    """The opener's share chosen by each response's difficulty (appendix A.7, Algorithm 2).

    Difficulty `d = mean_t H_S − mean_t H_T`; smoothed `d̄`: the mean of `d` and the last `smoothing − 1` raw
    difficulties. The share is that of the quantile interval of the last `window` smoothed values in which `d̄` falls;
    `d̄` equal to an edge belongs to the lower interval. Below `warmup` values the fixed share is used. `shares_for` reads
    a frozen history, so a step's answers do not depend on its batching; `append` extends it after the step, in the order
    of the rollouts.

    Args:
        edges: quantiles between the intervals, rising, in (0, 1); the paper's table is not in its text.
        shares: one per interval, in [0, 1].
        fixed_share: c while the history is short.
        window, warmup, smoothing: how many values the history keeps, needs, and smooths over.
    """

    edges: tuple[float, ...] = (0.25, 0.5, 0.75)
    shares: tuple[float, ...] = (0.05, 0.10, 0.15, 0.20)
    fixed_share: float = 0.1
    window: int = 256
    warmup: int = 20
    smoothing: int = 5
    raw: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    needs = "both"

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError(
                f"{len(self.edges)} quantile edges make {len(self.edges) + 1} intervals but {len(self.shares)} shares were "
                "given: pass one share per interval."
            )
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < edge < 1 for edge in self.edges):
            raise ValueError(f"edges={self.edges}: quantiles between intervals must rise and lie in (0, 1).")
        for share in (*self.shares, self.fixed_share):
            check_share("shares", share)

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        shares = self._shares(self.difficulty(statistics))
        return opener_mask(statistics.student_entropy, statistics.mask, shares.unsqueeze(-1))

    @staticmethod
    def difficulty(statistics: TokenStatistics) -> torch.Tensor:
        """`[responses]`, float64: mean H_S − mean H_T of each response."""
        assert statistics.teacher_entropy is not None
        gap = torch.where(statistics.mask, (statistics.student_entropy - statistics.teacher_entropy).double(), 0.0)
        return gap.sum(-1) / statistics.mask.sum(-1).clamp(min=1)

    def _smooth(self, difficulty: Any) -> Any:
        return (sum(self.raw) + difficulty) / (len(self.raw) + 1)  # the history keeps the last smoothing − 1

    def _shares(self, difficulties: torch.Tensor) -> torch.Tensor:
        if len(self.smoothed) < self.warmup:
            return torch.full_like(difficulties, self.fixed_share)
        history = torch.tensor(self.smoothed, dtype=torch.float64)
        bounds = torch.quantile(history, torch.tensor(self.edges, dtype=torch.float64)).to(difficulties.device)
        interval = (self._smooth(difficulties).unsqueeze(-1) > bounds).sum(-1)
        return torch.tensor(self.shares, dtype=torch.float64, device=difficulties.device)[interval]

    def shares_for(self, difficulties: Sequence[float]) -> list[float]:
        """The opener's share for each response of a step, from the history before it."""
        return self._shares(torch.tensor(list(difficulties), dtype=torch.float64)).tolist()

    def append(self, difficulties: Sequence[float]) -> None:
        """Extend the history by a step's difficulties, in the order of the rollouts; each is smoothed as it was judged."""
        self.smoothed += [self._smooth(difficulty) for difficulty in difficulties]
        self.raw += difficulties
        self.smoothed = self.smoothed[-self.window :]
        self.raw = self.raw[-(self.smoothing - 1) :] if self.smoothing > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"raw": list(self.raw), "smoothed": list(self.smoothed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's history."""
        self.raw, self.smoothed = list(state["raw"]), list(state["smoothed"])

"""Masks from per-token statistics, one completion a row, without gradient."""

from __future__ import annotations

import math

import torch

from tsdkd.checks import check_share

# A share of a length, as the paper's ceil(ρ·L), but 0.07 · 100 is 7 and not 8.
_CEIL_SLACK = 1e-9


def top_count(length: int, fraction: float) -> int:
    """ceil(ρ·L), how many of a completion's `length` tokens are selected.

    Example:
        >>> top_count(100, 0.07), top_count(3, 0.1), top_count(0, 0.1)
        (7, 1, 0)
    """
    return math.ceil(fraction * length - _CEIL_SLACK)


def opener_mask(
    student_entropy: torch.Tensor, mask: torch.Tensor, opener_entropy_share: float | torch.Tensor = 0.1
) -> torch.Tensor:
    """The opener of each completion: its first tokens, up to a share of the completion's whole entropy.

    Formula: the first `n` trained tokens, `n` the smallest with `Σ_{t≤n} H_S(t) ≥ c · Σ_{t≤L} H_S(t)`; the crossing
    token is in. Sums run in float64.

    Args:
        student_entropy: `[completions, longest]`, nats.
        mask: `[completions, longest]` bool, True where a trained token stands.
        opener_entropy_share: c in [0, 1]; 0 selects nothing (the term is off), 1 everything up to the last uncertain
            token. A tensor `[completions, 1]` gives each completion its own.

    Returns:
        `[completions, longest]` bool.

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
    """The tokens of each completion where the student is least certain; of equal entropies the earlier token.

    Args:
        student_entropy: `[completions, longest]`, nats.
        mask: `[completions, longest]` bool, True where a trained token stands.
        top_entropy_fraction: ρ in [0, 1]; ceil(ρ·L) tokens of a completion of L are kept, 0 selects nothing.

    Returns:
        `[completions, longest]` bool.

    Raises:
        ValueError: a fraction outside [0, 1].

    Example:
        >>> top_entropy_mask(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.ones(1, 4).bool(), 0.25).tolist()
        [[False, True, False, False]]

    References:
        TSD-KD Eq. 12.
    """
    check_share("top_entropy_fraction", top_entropy_fraction)
    return highest(student_entropy, mask, kept(mask, top_entropy_fraction))


def kept(mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """`top_count` of each completion, `[completions, 1]`."""
    return (fraction * mask.sum(-1, keepdim=True).double() - _CEIL_SLACK).ceil()


def highest(values: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The `kept` `[completions, 1]` highest values of each completion, of equal ones the earlier."""
    ranked = torch.where(mask, values.detach().double(), -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(mask.shape[-1], device=mask.device).expand_as(order))
    return mask & (rank < kept)

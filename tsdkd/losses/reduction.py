"""The only place where per-token values become a scalar, and where counts enter.

A term is `Σ coefficient · value / count`. The count is that of the **whole** optimizer step, known as soon as the rollouts
exist, so that the loss and its gradient do not depend on how the rollouts are split over micro-batches, processes and
padding.
"""

from __future__ import annotations

import torch


def token_coefficients(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 on every kept token: the sum over tokens (direct and entropy terms)."""
    return mask.to(dtype)


def response_coefficients(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 / n on the n kept tokens of each completion: the sum over completions of the mean inside each (indirect term).

    The number of opener tokens of other micro-batches is unknown before their forward pass, so a mean pooled over the
    step could not be exact; a mean inside each completion is.

    Args:
        mask: `[completions, longest]` bool.
    """
    return mask.to(dtype) / mask.sum(-1, keepdim=True).clamp(min=1)


def weighted_sum(values: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Σ coefficient · value, 0-d, where the coefficient is not 0; a NaN elsewhere reaches neither value nor gradient."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    return (torch.where(coefficients != 0, values, zero) * coefficients).sum()


def divide(total: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """`total / count`; where nothing is counted the total, a zero, stays as it is."""
    if isinstance(count, torch.Tensor):
        return total / count.to(total).clamp(min=1.0)
    return total / max(float(count), 1.0)

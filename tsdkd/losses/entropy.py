"""Entropies of next-token distributions, in nats (Eq. 10)."""

from __future__ import annotations

import torch

from tsdkd.losses.divergence import log_probs


def token_entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """How uncertain a model is at each token; the gradient flows (Eq. 12 minimises it).

    Formula: `H = −Σ_v p(v) log p(v)`, `p = softmax(logits / temperature)`.

    Args:
        logits: `[..., vocab]`.
        temperature: τ, above 0.

    Returns:
        `[...]`, nats: 0 for a certain model, log(vocab) for a uniform one.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> round(token_entropy(torch.zeros(4)).item(), 4)
        1.3863

    References:
        TSD-KD Eq. 10.
    """
    log_p = log_probs(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_gap(student_entropy: torch.Tensor, teacher_entropy: torch.Tensor) -> torch.Tensor:
    """H_S − H_T: above 0 where the student is less certain than the teacher (Eq. 11, before the sigmoid)."""
    return student_entropy - teacher_entropy

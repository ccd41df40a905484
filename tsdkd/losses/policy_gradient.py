"""The policy gradient of MiniLLM (Gu et al. 2024), per token, on recorded log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.checks import check_share


def mean_of_rest(rewards: torch.Tensor, lengths: Sequence[int], *, normalise: bool = True) -> torch.Tensor:
    """What follows a token: the mean (or the sum) of the rewards of the later tokens of its completion.

    Formula: `R̄_{t+1} = Σ_{t'>t} r_t' / (L − t)`, t from 1; 0 at the last token.

    Args:
        rewards: `[tokens]`, packed completions.
        lengths: the tokens of each completion, whose sum is `tokens`.
        normalise: the mean over the later tokens (MiniLLM's length normalisation); False is their sum.

    Returns:
        `[tokens]`, in the order of `rewards`.

    Example:
        >>> mean_of_rest(torch.tensor([1.0, 2.0, 4.0, 8.0]), [3, 1]).tolist()
        [3.0, 4.0, 0.0, 0.0]

    References:
        MiniLLM section 2.2, length normalisation; arXiv 2306.08543.
    """
    parts = []
    for part in rewards.detach().split(list(lengths)):
        after = part.flip(0).cumsum(0).flip(0) - part
        if normalise:
            after = after / torch.arange(len(part) - 1, -1, -1, device=part.device).clamp(min=1)
        parts.append(after)
    return torch.cat(parts) if parts else rewards.detach()


def clipped_surrogate(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    """The policy-gradient loss of sampled tokens, with PPO's clipping of the ratio to the policy that sampled.

    Formula: `−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)`, `ρ = p_S(y_t) / p_old(y_t)`. At ρ = 1 its gradient is −A ∇log p_S(y_t).

    Args:
        log_probs: `[tokens]`, log p_S(y_t), with gradient.
        old_log_probs: `[tokens]`, recorded when the completions were written.
        advantages: `[tokens]`, without gradient.
        clip: ε in [0, 1].

    Returns:
        `[tokens]`.

    Raises:
        ValueError: a clip outside [0, 1].

    References:
        MiniLLM section 2.2; Schulman et al. 2017, Eq. 7.
    """
    check_share("clip", clip)
    ratio = (log_probs - old_log_probs.detach()).exp()
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)

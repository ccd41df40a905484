"""Entropies of next-token distributions, in nats (Eq. 10)."""

from __future__ import annotations

import torch

from tsdkd.checks import check_choice
from tsdkd.losses.divergence import expectation, log_probs

ENTROPY_TARGETS = ("zero", "teacher")


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
    return -expectation(log_p.exp(), log_p)


def entropy_penalty(
    student_entropy: torch.Tensor, teacher_entropy: torch.Tensor | None = None, target: str = "zero"
) -> torch.Tensor:
    """What entropy minimisation minimises at each token; the gradient flows through the student's entropy.

    Formula: `H_S` for the target `"zero"` (Eq. 12), `max(0, H_S − H_T)` for `"teacher"`: no sharpening below the
    teacher, an option of ours.

    Args:
        student_entropy, teacher_entropy: nats, equal shapes; the target `"zero"` needs no teacher.
        target: `"zero"` or `"teacher"`.

    Raises:
        ValueError: an unknown target.

    Example:
        >>> entropy_penalty(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 1.5]), "teacher").tolist()
        [0.5, 0.0]

    References:
        TSD-KD Eq. 12.
    """
    check_choice("entropy_target", target, ENTROPY_TARGETS)
    if target == "zero":
        return student_entropy
    assert teacher_entropy is not None, "the target 'teacher' reads the teacher's entropy"
    return (student_entropy - teacher_entropy.detach()).clamp(min=0.0)

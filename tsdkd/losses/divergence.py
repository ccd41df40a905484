"""Divergences between next-token distributions, per token and unreduced.

Every function takes student logits first, both `[..., vocab]`, and returns `[...]` in nats: zero where the two
distributions are equal, never negative, infinite where one gives mass to an id that is impossible to the other (a logit of
−∞). The teacher receives no gradient. bf16 and fp16 logits are computed in float32.
`p_T`, `p_S` are the softmax of teacher and student logits divided by `temperature`; there is no factor τ².
"""

from __future__ import annotations

import math

import torch

from tsdkd.checks import check_positive, check_same_shape, check_share


def shared_vocabulary(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits cut to the first `min(V_S, V_T)` ids.

    Models of one family pad the same vocabulary to different sizes (Qwen2.5: 151 936 and 152 064); the ids that both
    have are the first ones, and each distribution is normalised there.

    Example:
        >>> student, teacher = shared_vocabulary(torch.zeros(2, 7), torch.zeros(2, 9))
        >>> student.shape == teacher.shape == (2, 7)
        True
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return student_logits[..., :size], teacher_logits[..., :size]


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 as float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def log_probs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature), `[..., vocab]`, in float32 or better."""
    check_positive("temperature", temperature)
    return torch.log_softmax(full_precision(logits) / temperature, dim=-1)


def expectation(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ_v p(v) · values(v), `[..., vocab]` → `[...]`, with 0 · ∞ = 0: an id of probability 0 reaches nothing."""
    return (p * values.masked_fill(p == 0, 0.0)).sum(-1)


def _both(student_logits, teacher_logits, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    check_same_shape(student_logits, teacher_logits)
    return log_probs(student_logits, temperature), log_probs(teacher_logits.detach(), temperature)


def _log_mixture(first: torch.Tensor, first_weight: float, second: torch.Tensor) -> torch.Tensor:
    """log(w · p + (1 − w) · q) from log p and log q; 0, which no sum reads, where both probabilities are 0."""
    nothing = first.isneginf() & second.isneginf()  # logaddexp's gradient there is NaN
    first, second = first.masked_fill(nothing, 0.0), second.masked_fill(nothing, 0.0)
    return torch.logaddexp(first + math.log(first_weight), second + math.log1p(-first_weight))


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_T ‖ p_S), mode-covering.

    Formula: `Σ_v p_T(v) · (log p_T(v) − log p_S(v))`.

    Args:
        student_logits, teacher_logits: `[..., vocab]`, equal shapes.
        temperature: τ, above 0.

    Returns:
        `[...]`, nats.

    Raises:
        ValueError: unequal shapes, or a temperature that is not above 0.

    Example:
        >>> round(forward_kl(torch.zeros(2), torch.tensor([1.0, 0.0])).item(), 4)
        0.1109

    References:
        TSD-KD section 2; Hinton et al. 2015.
    """
    student, teacher = _both(student_logits, teacher_logits, temperature)
    return expectation(teacher.exp(), teacher - student)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_S ‖ p_T), mode-seeking. Arguments, shapes and errors as in `forward_kl`.

    Formula: `Σ_v p_S(v) · (log p_S(v) − log p_T(v))`.

    Example:
        >>> round(reverse_kl(torch.zeros(2), torch.tensor([1.0, 0.0])).item(), 4)
        0.1201

    References:
        TSD-KD section 2; Gu et al. 2024.
    """
    student, teacher = _both(student_logits, teacher_logits, temperature)
    return expectation(student.exp(), student - teacher)


def generalized_jsd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.9, temperature: float = 1.0
) -> torch.Tensor:
    """The generalized Jensen-Shannon divergence that GKD and TSD-KD match distributions with.

    Formula: `β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m)` with `m = β p_T + (1−β) p_S`. `JSD_β / β` tends to the forward KL as
    β → 0 and `JSD_β / (1−β)` to the reverse KL as β → 1, while the JSD itself tends to 0 at both ends; at exactly 0 and
    1 the KLs themselves are returned (as TRL does), so the scale jumps there.

    Args:
        student_logits, teacher_logits: `[..., vocab]`, equal shapes.
        beta: 0 is the forward KL, 1 the reverse KL; the paper uses 0.9.
        temperature: τ, above 0.

    Returns:
        `[...]`, nats, at most the entropy of (β, 1−β).

    Raises:
        ValueError: beta outside [0, 1], unequal shapes, a temperature that is not above 0.

    Example:
        >>> round(generalized_jsd(torch.zeros(2), torch.tensor([1.0, 0.0]), beta=0.5).item(), 4)
        0.0285

    References:
        TSD-KD Eq. 1; Agarwal et al. 2024 (GKD); Huszár 2015.
    """
    check_share("beta", beta)
    if beta == 0.0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    student, teacher = _both(student_logits, teacher_logits, temperature)
    mixture = _log_mixture(teacher, beta, student)
    to_teacher = expectation(teacher.exp(), teacher - mixture)
    to_student = expectation(student.exp(), student - mixture)
    return beta * to_teacher + (1 - beta) * to_student


def skew_forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, alpha: float = 0.1, temperature: float = 1.0
) -> torch.Tensor:
    """DistiLLM's skew KL: the forward KL against a mixture that holds a little of the teacher.

    Formula: `KL(p_T ‖ α p_T + (1−α) p_S)`; α = 0 is the forward KL, α = 1 is 0 everywhere. Arguments and errors as in
    `generalized_jsd`, with `alpha` in place of `beta`.

    Example:
        >>> round(skew_forward_kl(torch.zeros(2), torch.tensor([1.0, 0.0])).item(), 4)
        0.0906

    References:
        Ko et al. 2024 (DistiLLM), section 3.1.
    """
    check_share("alpha", alpha)
    if alpha == 0.0:
        return forward_kl(student_logits, teacher_logits, temperature)
    student, teacher = _both(student_logits, teacher_logits, temperature)
    mixture = teacher if alpha == 1.0 else _log_mixture(teacher, alpha, student)
    return expectation(teacher.exp(), teacher - mixture)


def skew_reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, alpha: float = 0.1, temperature: float = 1.0
) -> torch.Tensor:
    """DistiLLM's skew reverse KL: the reverse KL against a mixture that holds a little of the student.

    Formula: `KL(p_S ‖ (1−α) p_T + α p_S)`; α = 0 is the reverse KL, α = 1 is 0 everywhere. Arguments and errors as in
    `generalized_jsd`, with `alpha` in place of `beta`.

    Example:
        >>> round(skew_reverse_kl(torch.zeros(2), torch.tensor([1.0, 0.0])).item(), 4)
        0.095

    References:
        Ko et al. 2024 (DistiLLM), section 3.1.
    """
    check_share("alpha", alpha)
    if alpha == 0.0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    student, teacher = _both(student_logits, teacher_logits, temperature)
    mixture = student if alpha == 1.0 else _log_mixture(student, alpha, teacher)
    return expectation(student.exp(), student - mixture)

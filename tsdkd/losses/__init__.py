"""The formulas of the paper as small pure functions on logits: per token, unreduced, torch only."""

from tsdkd.losses.divergence import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    shared_vocabulary,
    skew_forward_kl,
    skew_reverse_kl,
)
from tsdkd.losses.entropy import ENTROPY_TARGETS, entropy_penalty, token_entropy
from tsdkd.losses.policy_gradient import clipped_surrogate, mean_of_rest
from tsdkd.losses.ranking import (
    STAGE_WEIGHTS,
    kendall_tau,
    plackett_luce_nll,
    student_candidates,
    teacher_mass,
    teacher_order,
)
from tsdkd.losses.reduction import divide, response_coefficients, token_coefficients, weighted_sum
from tsdkd.losses.registry import DIVERGENCES, check_divergence, resolve_divergence

__all__ = [
    "DIVERGENCES",
    "ENTROPY_TARGETS",
    "STAGE_WEIGHTS",
    "check_divergence",
    "clipped_surrogate",
    "divide",
    "entropy_penalty",
    "forward_kl",
    "generalized_jsd",
    "kendall_tau",
    "mean_of_rest",
    "plackett_luce_nll",
    "resolve_divergence",
    "response_coefficients",
    "reverse_kl",
    "shared_vocabulary",
    "skew_forward_kl",
    "skew_reverse_kl",
    "student_candidates",
    "teacher_mass",
    "teacher_order",
    "token_coefficients",
    "token_entropy",
    "weighted_sum",
]

"""Gates: the weight of a token from its own statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsdkd.checks import check_positive
from tsdkd.types import TokenStatistics


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

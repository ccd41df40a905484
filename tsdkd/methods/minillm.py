"""MiniLLM (Gu et al. 2024): the reverse KL of whole answers by policy gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsdkd import fused
from tsdkd.checks import check_positive, check_share, check_weight
from tsdkd.losses import clipped_surrogate, mean_of_rest
from tsdkd.methods.base import cross_entropy, step_counts
from tsdkd.types import Answers, Counts, Head, LossTerms, Objective, TokenBatch

TERMS = ("direct", "sampled")


@dataclass(frozen=True, kw_only=True)
class MiniLLM:
    """Reverse KL of sequences, its gradient split into a single step, exact, and what follows it, sampled.

    loss = KL(p_S ‖ p_T) at each token − w_t R̄_{t+1} log p_S(y_t), both the mean over tokens: R̄_{t+1} is the mean of
    r = log p_T(y)/p_S(y) over the later tokens, w_t = p_S(y_t) / p̃(y_t) the importance of a token that was drawn from the
    mixture p̃ = α p_T + (1 − α) p_S. r and w come from the log-probabilities recorded when the answer was written; the
    second part is clipped as PPO's.

    Attributes:
        alpha: α, the teacher's share of the mixture (teacher-mixed sampling), 0.2 in the paper; 0 is on-policy.
        clip: ε of the clipping, 0.2.
        length_normalisation: the mean, not the sum, over the later tokens.
        direct_weight, sampled_weight: weights of the single step and of what follows it; both 1 is the paper.
        pretraining_weight: weight of the language-model loss on a corpus (the trainer's `pretraining_dataset`), which the
            paper adds to keep what the student knew; 0 is off.
        kd_temperature: τ of both distributions in the loss.

    References:
        Gu et al. 2024, section 2.2, Eq. 3-8; arXiv 2306.08543.
    """

    alpha: float = 0.2
    clip: float = 0.2
    length_normalisation: bool = True
    direct_weight: float = 1.0
    sampled_weight: float = 1.0
    pretraining_weight: float = 0.0
    kd_temperature: float = 1.0

    name = "minillm"
    title = "MiniLLM"
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "MiniLLM: Knowledge Distillation of Large Language Models",
        "id": "2306.08543",
        "citation": (
            "@inproceedings{gu2024minillm,\n"
            "    title     = {{MiniLLM: Knowledge Distillation of Large Language Models}},\n"
            "    author    = {Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie},\n"
            "    booktitle = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},\n"
            "    year      = 2024,\n"
            "    note      = {arXiv:2306.08543},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        for name in ("alpha", "clip"):
            check_share(name, getattr(self, name))
        for name in ("direct_weight", "sampled_weight", "pretraining_weight"):
            check_weight(name, getattr(self, name))
        check_positive("kd_temperature", self.kd_temperature)

    @property
    def answers(self) -> Answers:
        return Answers(writer="mixed", options={"alpha": self.alpha, "temperature": self.kd_temperature})

    def counts(self, lengths: Sequence[int]) -> Counts:
        return step_counts(lengths)

    def terms(self) -> dict[str, float]:
        return {"direct": self.direct_weight, "sampled": self.sampled_weight}

    def only(self, term: str) -> MiniLLM:
        off: dict[str, Any] = {f"{other}_weight": 0.0 for other in TERMS if other != term}
        return dataclasses.replace(self, **off)

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        sampled = None
        if self.sampled_weight and batch.recorded:  # an evaluation scores the student's plain answers, nothing recorded
            old, teacher, mixture = (batch.recorded[name] for name in ("student", "teacher", "mixture"))
            following = mean_of_rest(teacher - old, batch.lengths, normalise=self.length_normalisation)
            advantages = (old - mixture).exp() * following

            def sampled(log_probs, rows):
                return clipped_surrogate(log_probs, old[rows].to(log_probs), advantages[rows].to(log_probs), self.clip)

        objective = Objective(
            divergence="reverse_kl",
            divergence_parameter=0.0,
            direct_weight=self.direct_weight,
            sampled_weight=self.sampled_weight,
            sampled=sampled,
            temperature=self.kd_temperature,
        )
        return fused.evaluate(objective, batch, student_head, teacher_head, counts=counts, **engine)

    def pretraining_loss(
        self, batch: TokenBatch, student_head: Head, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        """−log p_S of a corpus's tokens, the mean over them, untempered."""
        objective = Objective(direct_weight=0.0, sampled_weight=1.0, sampled=cross_entropy)
        return fused.evaluate(objective, batch, student_head, None, counts=counts, **engine)

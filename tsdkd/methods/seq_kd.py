"""SeqKD (Kim & Rush 2016): cross-entropy on answers that the teacher wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsdkd import fused
from tsdkd.checks import check_positive
from tsdkd.methods.base import cross_entropy, step_counts
from tsdkd.types import Answers, Counts, Head, LossTerms, Objective, TokenBatch


@dataclass(frozen=True, kw_only=True)
class SeqKD:
    """Sequence-level distillation: the student learns to write what the teacher wrote.

    loss = −log p_S(y_t), the mean over tokens, y the data set's answers or, where there are none, the teacher's.

    Attributes:
        kd_temperature: τ of p_S.

    References:
        Kim & Rush 2016, section 3.2; arXiv 1606.07947.
    """

    kd_temperature: float = 1.0

    name = "seq_kd"
    title = "SeqKD"
    reads_teacher = False
    paper = {  # noqa: RUF012  (a constant of the class, not a field)
        "title": "Sequence-Level Knowledge Distillation",
        "id": "1606.07947",
        "citation": (
            "@inproceedings{kim2016sequence,\n"
            "    title     = {{Sequence-Level Knowledge Distillation}},\n"
            "    author    = {Kim, Yoon and Rush, Alexander M.},\n"
            "    booktitle = {Proceedings of the 2016 Conference on Empirical Methods in Natural Language Processing},\n"
            "    year      = 2016,\n"
            "    note      = {arXiv:1606.07947},\n"
            "}"
        ),
    }

    def __post_init__(self) -> None:
        check_positive("kd_temperature", self.kd_temperature)

    @property
    def answers(self) -> Answers:
        return Answers(share=0.0, teacher_may_write=True, evaluate_on="dataset")

    def counts(self, lengths: Sequence[int]) -> Counts:
        return step_counts(lengths)

    def terms(self) -> dict[str, float]:
        return {"sampled": 1.0}

    def only(self, term: str) -> SeqKD:
        return self

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        objective = Objective(direct_weight=0.0, sampled_weight=1.0, sampled=cross_entropy, temperature=self.kd_temperature)
        return fused.evaluate(objective, batch, student_head, teacher_head, counts=counts, **engine)

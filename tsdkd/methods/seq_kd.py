"""SeqKD (Kim & Rush 2016): cross-entropy on completions that the teacher wrote."""

from __future__ import annotations

from dataclasses import dataclass

from tsdkd.checks import check_positive
from tsdkd.methods.base import Method, State, cross_entropy
from tsdkd.types import Objective, RolloutSpec, SampledTerm, TokenBatch


@dataclass(frozen=True, kw_only=True)
class SeqKD(Method):
    """Sequence-level distillation: the student learns to write what the teacher wrote.

    loss = −log p_S(y_t), the mean over tokens, y the data set's completions or, where there are none, the teacher's.

    Attributes:
        kd_temperature: τ of p_S.

    References:
        Kim & Rush 2016, section 3.2; arXiv 1606.07947.
    """

    kd_temperature: float = 1.0

    name = "seq_kd"
    title = "SeqKD"
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
    def rollouts(self) -> RolloutSpec:
        return RolloutSpec(share=0.0, teacher_may_write=True, evaluate_on="dataset")

    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        return Objective((SampledTerm(name="sampled", function=cross_entropy),), self.kd_temperature)

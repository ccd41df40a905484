"""What a method states: its loss, its terms and their weights, the counts that normalise them, and whose answers it reads."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from tsdkd import fused
from tsdkd.checks import check_positive
from tsdkd.selection import Gate, Selection, direct_count, resolve_gate, resolve_selection
from tsdkd.types import Answers, Counts, Head, LossTerms, Objective, TokenBatch


@runtime_checkable
class Method(Protocol):
    """A token-level distillation method, blind to trainers; any object with these members is one.

    Attributes:
        name: how a config names it; an attribute `title`, where there is one, is its name in prose.
        paper: `title`, `id` (arXiv) and `citation` (BibTeX), for the model card.

    A method may have more; a trainer that does not find them takes what stands in brackets:
        answers: whose answers it trains on (`types.Answers()`: the student's own).
        reads_teacher: whether its loss reads the teacher at all (True).
        reads(length): how many of a response's first tokens its terms read (all of them); the rest is not run through any
            model, and `loss` gets a batch that is `cut`.
        teacher_prefix: a selection on the student's statistics, the first tokens of a response, outside of which no term reads
            the teacher: then the student reads first, and the teacher the prefix alone (None).
        pretraining_weight, pretraining_loss(batch, student_head, counts): a language-model loss on a corpus beside the answers,
            and its weight (0).
        state: what changes from step to step and belongs to a checkpoint, e.g. an `AdaptiveOpener` (None).
    """

    name: str
    paper: dict[str, str]

    def counts(self, lengths: Sequence[int]) -> Counts:
        """What the terms are divided by, from the trained tokens of each response of a step."""
        ...

    def terms(self) -> dict[str, float]:
        """Each term's weight in the loss, by the name it is logged under."""
        ...

    def only(self, term: str) -> Method:
        """The same method with every other term's weight 0."""
        ...

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        """The loss of packed tokens; `engine` is handed to `fused.evaluate` (`impl`, `chunk_tokens`)."""
        ...


def cross_entropy(log_probs: torch.Tensor, rows: slice) -> torch.Tensor:
    """−log p_S(y_t), as an objective's term on the tokens that stand."""
    return -log_probs


def step_counts(lengths: Sequence[int], selection: Selection | None = None, top_entropy: int = 0) -> Counts:
    """What a step's terms are divided by, from its lengths; `top_entropy` tokens are selected by the entropy term."""
    direct = None if selection is None else direct_count(selection, lengths)
    return Counts(sum(lengths), top_entropy, sum(length > 0 for length in lengths), direct)


def reads_own_token(gate: str | Gate | None) -> bool:
    """Whether a gate reads nothing of other tokens; every named one does not."""
    return not callable(gate) or getattr(gate, "needs", "token") == "token"


def reads_of(selection: str | Selection | None, share: float, gate: str | Gate | None, length: int) -> int:
    """How many of a response's first tokens a direct term reads, where lengths tell."""
    of_rule = getattr(resolve_selection(selection, share), "reads", None) if reads_own_token(gate) else None
    return length if of_rule is None else of_rule(length)


def prefix_of(selection: Selection | None) -> Selection | None:
    """The selection, where it keeps first tokens that the student's statistics tell; else None."""
    is_prefix = getattr(selection, "is_prefix", False) and getattr(selection, "needs", "both") == "student"
    return selection if is_prefix else None


@dataclass(frozen=True, kw_only=True)
class DivergenceMethod(abc.ABC):
    """What methods share whose loss is one divergence per token, weighed and selected: a base for a paper's file.

    Attributes:
        gate: a name in `selection.GATES` or a function of `TokenStatistics`; `"none"` is weight 1.
        gate_sharpness: γ of a named gate.
        selection: a name in `selection.SELECTIONS` or a function of `TokenStatistics`; `"none"` is all tokens.
        selection_share: the share that a named selection keeps.
        kd_temperature: τ of the divergence.
    """

    gate: str | Gate | None = "none"
    gate_sharpness: float = 1.0
    selection: str | Selection | None = "none"
    selection_share: float = 0.5
    kd_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive("gate_sharpness", self.gate_sharpness)
        check_positive("kd_temperature", self.kd_temperature)
        resolve_gate(self.gate, self.gate_sharpness)
        resolve_selection(self.selection, self.selection_share)

    @abc.abstractmethod
    def divergence_of(self) -> tuple[str, float]:
        """The divergence's name in `losses` and its parameter (0 of one without)."""

    @property
    def answers(self) -> Answers:
        """The student's own, unless a paper's file says otherwise."""
        return Answers()

    def objective(self) -> Objective:
        """The direct term, as an engine reads it."""
        name, parameter = self.divergence_of()
        return Objective(
            divergence=name,
            divergence_parameter=parameter,
            gate=resolve_gate(self.gate, self.gate_sharpness),
            selection=resolve_selection(self.selection, self.selection_share),
            temperature=self.kd_temperature,
        )

    def counts(self, lengths: Sequence[int]) -> Counts:
        return step_counts(lengths, resolve_selection(self.selection, self.selection_share))

    def reads(self, length: int) -> int:
        """How many of a response's first tokens the term reads: a prefix spares both models the rest."""
        return reads_of(self.selection, self.selection_share, self.gate, length)

    @property
    def teacher_prefix(self) -> Selection | None:
        """The selection, where it is a prefix that the student's statistics tell."""
        return prefix_of(resolve_selection(self.selection, self.selection_share)) if reads_own_token(self.gate) else None

    def terms(self) -> dict[str, float]:
        return {"direct": 1.0}

    def only(self, term: str) -> DivergenceMethod:
        return self

    def loss(
        self, batch: TokenBatch, student_head: Head, teacher_head: Head | None, *, counts: Counts | None = None, **engine: Any
    ) -> LossTerms:
        return fused.evaluate(self.objective(), batch, student_head, teacher_head, counts=counts, **engine)

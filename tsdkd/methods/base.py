"""What a method states: whose completions it trains on, the terms of its loss, and what changes from step to step."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tsdkd import fused
from tsdkd.checks import check_positive
from tsdkd.losses import resolve_divergence
from tsdkd.selection import Gate, Selection, resolve_gate, resolve_selection
from tsdkd.types import (
    Counts,
    DivergenceTerm,
    Head,
    LossTerms,
    Objective,
    ReadPlan,
    RolloutSpec,
    SampledTerm,
    TokenBatch,
    TokenStatistics,
    VocabularyMap,
)


@dataclass(frozen=True)
class Summary:
    """A step that was made, as host numbers over all processes.

    Attributes:
        step: the optimizer step, from 1.
        loss: of the step, without a corpus's part; None where the state does not ask for it (`State.reads_loss`).
        terms: each term's value by its name; empty likewise.
        observed: what `State.observe` gave, a list for each completion with a token, in the order of the rollouts.
    """

    step: int
    loss: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    observed: Sequence[Sequence[float]] = ()


class State:
    """What changes from step to step and belongs to a checkpoint; the trainer makes, feeds and saves it.

    Attributes:
        reads_loss: whether `after_step` is to be given the step's loss and terms; reading them waits for the device, so
            they ride on the guard's one reduction.
    """

    reads_loss: ClassVar[bool] = False

    def observe(self, statistics: TokenStatistics) -> torch.Tensor | None:
        """`[completions, n]` of a micro-batch, to be collected for the step; None is nothing."""
        return None

    def after_step(self, summary: Summary) -> None:
        """Called once an optimizer step's gradients are sound, on every process with the same numbers."""

    def after_evaluation(self, loss: float, name: str) -> None:
        """Called after an evaluation during training, with its loss and its prefix (`eval`, `eval_<set>`)."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; empty is nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class Method(abc.ABC):
    """A token-level distillation method, blind to trainers: a base class with a default for everything but the objective.

    Options are a frozen dataclass's fields, and hashable; what changes is in a `State`, which a run makes by `start`.

    Attributes:
        name: how a config names it, and what its runs are called.
        title: its name in prose; the name where it is empty.
        paper: `title`, `id` (arXiv) and `citation` (BibTeX), for the model card.
        pretraining_weight: weight of a language-model loss on a corpus beside the completions; 0 is none.
        alignment: of a method for a teacher of another tokenizer, how tokens are paired: `"text"`, those that begin at one
            place of the completion's text, or `"position"`, the first with the first; empty: both share one tokenizer.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[Mapping[str, str]] = {"title": "", "id": "", "citation": ""}
    pretraining_weight: float = 0.0
    alignment: str = ""

    @abc.abstractmethod
    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        """The terms and their temperature, so that a term may close over its batch and over the run's state.

        Without a batch: every term by name, weight, selection and gate, as counts and logs need them. With one, a term that
        the batch does not allow (recorded log-probabilities in an evaluation) is left out; none is added. Without a state: the
        first. A state may move weights, selections and divergences.
        """

    @property
    def rollouts(self) -> RolloutSpec:
        """Whose completions it trains on; the student's own, unless a paper's file says otherwise."""
        return RolloutSpec()

    def start(self, max_steps: int | None) -> State:
        """The state of a run of so many optimizer steps; None outside of training (evaluation, recording, pages)."""
        return State()

    @property
    def reads_teacher(self) -> bool:
        """Whether its loss reads the teacher at all, as it starts."""
        return fused.reads_teacher(self.objective())

    def terms(self, state: State | None = None) -> dict[str, float]:
        """Each term's weight in the loss, by the name it is logged under."""
        return {term.name: term.weight for term in self.objective(None, state).terms}

    def across(self, vocabularies: VocabularyMap) -> Method:
        """The same for a teacher of another tokenizer.

        Raises:
            ValueError: it compares the two models id by id.
        """
        raise ValueError(
            f"{self.title or self.name} compares the two models id by id, and the teacher is of another tokenizer: use a "
            "method for that (uld, gold), or a teacher of the student's family."
        )

    def counts(self, lengths: Sequence[int], state: State | None = None, paired: Sequence[int] | None = None) -> Counts:
        """What the terms are divided by, from the trained tokens of each completion of a step; see `Objective.counts`."""
        return self.objective(None, state).counts(lengths, paired)

    def reads(self, lengths: Sequence[int], state: State | None = None) -> ReadPlan:
        """How much of each completion the models read."""
        return fused.read_plan(self.objective(None, state), tuple(lengths))

    def only(self, term: str) -> Method:
        """The same method with every other term's weight 0."""
        return _OneTerm(self, term)

    def loss(
        self,
        batch: TokenBatch,
        student_head: Head,
        teacher_head: Head | None,
        *,
        counts: Counts | None = None,
        state: State | None = None,
        **engine: Any,
    ) -> LossTerms:
        """The loss of packed tokens; `engine` is handed to `fused.evaluate` (`impl`, `chunk_tokens`)."""
        return fused.evaluate(self.objective(batch, state), batch, student_head, teacher_head, counts=counts, **engine)

    def check_given(self, terms: LossTerms, state: State | None = None) -> None:
        """Refuse a loss that gives other terms than the method states.

        Raises:
            ValueError: naming them.
        """
        stated = {name for name, weight in self.terms(state).items() if weight}
        lost = sorted(stated ^ terms.terms.keys())
        if lost:
            raise ValueError(
                f"the method {self.name} states the terms {', '.join(sorted(stated)) or 'none'}, but its loss gave "
                f"{', '.join(sorted(terms.terms)) or 'none'}: {', '.join(lost)} would be counted or logged by nobody. Let "
                "terms(), and objective() with and without a batch, name the same."
            )


class _OneTerm(Method):
    """A method with one of its terms on."""

    def __init__(self, method: Method, term: str) -> None:
        self.method, self.term = method, term
        self.name, self.title, self.paper = method.name, method.title, method.paper  # type: ignore[misc]

    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        return self.method.objective(batch, state).only(self.term)

    def start(self, max_steps: int | None) -> State:
        return self.method.start(max_steps)

    @property
    def rollouts(self) -> RolloutSpec:
        return self.method.rollouts

    def counts(self, lengths: Sequence[int], state: State | None = None, paired: Sequence[int] | None = None) -> Counts:
        return self.method.counts(lengths, state, paired)


def by_share(lmbda: float) -> RolloutSpec:
    """The student's completions with probability λ, drawn for each step, else the data set's; without any of its own an
    evaluation reads the data set's, too."""
    return RolloutSpec(share=lmbda, evaluate_on="student" if lmbda else "dataset")


def cross_entropy(log_probs: torch.Tensor, rows: slice) -> torch.Tensor:
    """−log p_S(y_t), as the function of a term on the tokens that stand."""
    return -log_probs


PRETRAINING = Objective((SampledTerm(name="pretraining", function=cross_entropy),))
"""The language-model loss of a corpus: −log p_S of its tokens, the mean over them, untempered."""


@dataclass(frozen=True, kw_only=True)
class DivergenceMethod(Method):
    """What methods share whose loss is one divergence per token, weighed and selected: a base for a paper's file.

    A file of its own sets `name`, `paper` and, where it names the divergence itself, `divergence_of`.

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
        self.objective()  # refuses an unknown gate, selection or divergence

    @abc.abstractmethod
    def divergence_of(self, state: State | None = None) -> Any:
        """The divergence: a name in `losses.DIVERGENCES`, a function of two logit tensors, or what
        `losses.resolve_divergence` gives; it may follow the run's state."""

    def objective(self, batch: TokenBatch | None = None, state: State | None = None) -> Objective:
        term = DivergenceTerm(
            name="direct",
            divergence=resolve_divergence(self.divergence_of(state)),
            gate=resolve_gate(self.gate, self.gate_sharpness),
            selection=resolve_selection(self.selection, self.selection_share),
        )
        return Objective((term,), self.kd_temperature)

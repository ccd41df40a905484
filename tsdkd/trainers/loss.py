"""The loss of a step from the student and its rollouts; it needs no trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tsdkd import fused
from tsdkd.methods import Method, State, Summary
from tsdkd.methods.base import PRETRAINING
from tsdkd.teachers.heads import head_of, last_hidden_state
from tsdkd.trainers.guard import Guard
from tsdkd.trainers.metrics import Metrics
from tsdkd.trainers.packing import by_teacher, hidden_states, of_teacher, packed
from tsdkd.trainers.routers import RouterLoss
from tsdkd.trainers.step import Step
from tsdkd.types import Head, LossTerms, ReadPlan, Rollouts, TokenBatch


class StepLoss:
    """`(student, step) → loss` of a micro-batch, in units of the whole step's counts; it owns the method's state.

    Args:
        method: whose loss it is.
        state: what of the method changes from step to step; None starts one outside of training.
        teacher_head: gives the teacher's head, on the device where the loss is computed; None without a teacher.
        head_of: from a name to the head, where there are several teachers.
        device: where that is.
        pad_id, padding_free: any id, for padding that no result depends on; none is used with `padding_free`.
        engine: for `fused.evaluate` (`impl`, `gradient_filter`, …).
        metrics, guard: what is logged and watched; None is nothing.
        autocast: the mixed-precision context of the student's forward pass.
        gathered: makes the heads of models whole (ZeRO-3).
        scale: what the loss of a training step is multiplied by.
        router: the load-balancing loss of a mixture's routers; None is none.
        beside: what is logged of a micro-batch and its heads beside the loss.

    Example:
        >>> step = StepLoss.step_of(method, rollouts, teacher_hidden)  # doctest: +SKIP
        >>> StepLoss(method, teacher_head=lambda: head, device=model.device)(model, step).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        method: Method,
        *,
        state: State | None = None,
        teacher_head: Callable[[], Head | None] = lambda: None,
        head_of: Callable[[str], Head] | None = None,
        device: torch.device | str = "cpu",
        pad_id: int = 0,
        padding_free: bool = False,
        engine: Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
        guard: Guard | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        gathered: Callable[..., AbstractContextManager] = lambda *models: nullcontext(),
        scale: float = 1.0,
        router: RouterLoss | None = None,
        beside: Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]] = lambda *given: {},
    ) -> None:
        self.method, self.state = method, method.start(None) if state is None else state
        self.teacher_head, self.device, self.pad_id = teacher_head, torch.device(device), pad_id
        self._head_of, self.padding_free, self.engine = head_of, padding_free, dict(engine or {})
        self.metrics, self.guard = metrics, guard
        self.autocast, self.gathered, self.scale, self.router, self.beside = autocast, gathered, scale, router, beside
        self.seen: Callable[[Step, LossTerms], None] = lambda part, terms: None  # told of each micro-batch that is trained on
        self.norms: dict[str, torch.Tensor] = {}  # each term's gradient, of when it was computed last
        self._observed, self._sums = list[tuple[list[int], torch.Tensor]](), dict[str, torch.Tensor]()

    @staticmethod
    def step_of(method: Method, rollouts: Rollouts, teacher_hidden: list[torch.Tensor] | None = None) -> Step:
        """A whole step of rollouts that one caller holds; the teacher reads as far as the student, as the method has it."""
        plan = dataclasses.replace(method.reads(rollouts.lengths), rule=None)
        return Step(rollouts, method.counts(rollouts.lengths), range(len(rollouts)), plan, teacher_hidden)

    def __call__(self, student: nn.Module, step: Step, *, mode: str = "train", term_norms: bool | None = None) -> torch.Tensor:
        """The loss, 0-d; in training mode times `scale`.

        Args:
            mode: `"train"` or `"eval"`, which logs apart and neither watches nor observes.
            term_norms: compute the norm of each term's gradient, too, into `norms`; True logs it.

        Raises:
            ValueError: a term of the method's that its loss does not give.
        """
        loss = torch.zeros((), device=self.device)
        with self.autocast():  # TRL's own forward runs outside of what accelerate put on `model.forward`
            parts = by_teacher(self._read(student, step), step, self.device)
            with self._time(mode), self.gathered(student):
                head = head_of(student)
                found = [self._terms(self.method, batch, head, part) for part, batch in parts]
                for (part, each), terms in zip(parts, found, strict=True):
                    terms.sums.update(self.beside(part, each, head, self._theirs(part)))
                if term_norms is not None:
                    self._term_norms(parts, head, log=term_norms)
        for (part, batch), terms in zip(parts, found, strict=True):
            self._add(mode, terms.sums)
            if part.rollouts.teachers:
                self._add(mode, of_teacher(part.rollouts.teachers[0], terms))
            loss = loss + terms.loss
            if mode != "eval":
                self.method.check_given(terms, self.state)
                self._note(terms, part)
                self.seen(part, terms)
                self._watch(part, batch, terms)
        if mode == "eval":
            return loss
        if self.router is not None:
            balance = self.router.take()
            self._add("train", {"loss/router": (balance.detach(), torch.ones_like(balance))})
            loss = loss + self.router.weight * self.router.share * balance
        if "corpus" in step.extra:
            with self.autocast():
                loss = loss + self._corpus(student, step)
        if self.guard is not None:
            self.guard.watch("the loss", loss)
        return loss * self.scale

    def _watch(self, part: Step, batch: TokenBatch, terms: LossTerms) -> None:
        if self.guard is None:
            return
        read = part.rollouts.first(part.plan.student)
        self.guard.watch_tokens("the student's hidden states", batch.student_hidden, read)
        if batch.teacher_hidden is not None:
            self.guard.watch_tokens("the teacher's hidden states", batch.teacher_hidden, read)  # all processes' one name
        for name in terms.terms:
            self.guard.watch(f"the {name} term", terms.sums[f"loss/{name}"][0])

    def batch_of(self, student: nn.Module, step: Step) -> TokenBatch:
        """The student's forward pass over a micro-batch, and beside it what the teacher gave."""
        return packed(self._read(student, step), step, self.device)

    def _read(self, student: nn.Module, step: Step) -> torch.Tensor:
        read = last_hidden_state if self.router is None else self.router.read
        own = lambda *inputs, **more: read(student, *inputs, **more)  # noqa: E731
        return hidden_states(own, step, self.pad_id, self.device, self.padding_free)

    def _terms(self, method: Method, batch: TokenBatch, head: Head, step: Step) -> LossTerms:
        return method.loss(batch, head, self._theirs(step), counts=step.counts, state=self.state, **self.engine)

    def _theirs(self, step: Step) -> Head | None:
        """The head of a step's one teacher."""
        several, names = self._head_of, step.rollouts.teachers
        return several(names[0]) if several is not None and names else self.teacher_head()

    def _corpus(self, student: nn.Module, step: Step) -> torch.Tensor:
        """The weighted loss of a micro-batch's texts, every token but the first predicted."""
        texts = [row for row in step.extra["corpus"] if row]
        if not texts:
            return torch.zeros((), device=self.device)
        rows = Rollouts([row[:1] for row in texts], [row[1:] for row in texts], [[1] * (len(row) - 1) for row in texts])
        batch = self.batch_of(student, Step(rows, step.counts, range(len(rows)), ReadPlan.whole(rows.lengths)))
        with self._time("train"), self.gathered(student):
            terms = fused.evaluate(PRETRAINING, batch, head_of(student), None, counts=step.counts, **self.engine)
        self._add("train", {"loss/pretraining": terms.sums["loss/pretraining"]})
        if self.guard is not None:
            self.guard.watch("the pretraining term", terms.loss)
        return self.method.pretraining_weight * terms.loss

    def _term_norms(self, parts: list[tuple[Step, TokenBatch]], head: Head, log: bool) -> None:
        """The norm of each weighted term's gradient with respect to the student's last hidden states."""
        bias = None if head.bias is None else head.bias.detach()
        frozen = dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
        for term, weight in self.method.terms(self.state).items():
            if weight == 0:
                continue
            norms = []
            for part, batch in parts:
                hidden = batch.student_hidden.detach().requires_grad_()
                alone = dataclasses.replace(batch, student_hidden=hidden)
                with torch.enable_grad():
                    loss = self._terms(self.method.only(term), alone, frozen, part).loss
                    (gradient,) = torch.autograd.grad(loss, hidden)
                norms.append(gradient.norm())
            norm = torch.stack(norms).norm()
            self.norms[term] = norm
            if log:  # the second name goes in 0.2
                pair = (norm, torch.ones_like(norm))
                self._add("train", {f"hidden_grad_norm/{term}": pair, f"grad_norm/{term}": pair})

    # ------------------------------------------------------------------ the state

    def _note(self, terms: LossTerms, step: Step) -> None:
        """Keep what the state observes of a micro-batch, and its part of the loss where the state asks for it."""
        observed = self.state.observe(terms.statistics)
        if observed is not None:
            if observed.ndim != 2 or len(observed) != len(step.rows):
                raise ValueError(
                    f"{type(self.state).__name__}.observe gave the shape {list(observed.shape)} for {len(step.rows)} "
                    "completions: give [completions, n], a row each."
                )
            kept = [row if length else -1 for row, length in zip(step.rows, step.rollouts.lengths, strict=True)]
            self._observed.append((kept, observed))
        if self.state.reads_loss:
            values = {"": terms.loss, **{name: result.value for name, result in terms.terms.items()}}
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def begin(self, state: State) -> None:
        """A run starts with this state; what an interrupted step left is forgotten."""
        self.state = state
        self._observed, self._sums = [], {}

    @property
    def numbers(self) -> list[torch.Tensor]:
        """This process's part of what `step_made` is to be given, summed over all."""
        return list(self._sums.values())

    def step_made(self, step: int, numbers: list[float], gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Tell the state of a step: in the order of the rollouts, without those that are empty.

        Args:
            step: its number, from 1.
            numbers: the sums of `numbers` over all processes.
            gather: of all processes' observations, `[completions, 1 + n]`.
        """
        summed = dict(zip(self._sums, numbers, strict=True))
        self._sums.clear()
        observed: list[list[float]] = []
        if self._observed:
            rows = torch.tensor([row for part, _ in self._observed for row in part], dtype=torch.float64, device=self.device)
            values = torch.cat([values for _, values in self._observed]).double()
            self._observed.clear()
            pairs = gather(torch.cat([rows.unsqueeze(-1), values], 1)).tolist()
            observed = [values for row, *values in sorted(pairs) if row >= 0]
        self.state.after_step(Summary(step, summed.pop("", None), summed, observed))

    def state_dict(self) -> dict[str, Any] | None:
        """The state's, for a checkpoint; None is nothing."""
        return self.state.state_dict() or None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.state.load_state_dict(state)

    # ------------------------------------------------------------------ what is logged

    def _add(self, mode: str, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self.metrics is not None:
            self.metrics.add(mode, sums)

    def _time(self, mode: str) -> AbstractContextManager:
        return nullcontext() if self.metrics is None else self.metrics.time(mode, "loss")

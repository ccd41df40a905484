"""The loss of a step from the student and its rollouts; it needs no trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tsdkd import fused
from tsdkd.methods import Method, State, Summary
from tsdkd.methods.base import PRETRAINING
from tsdkd.teachers.heads import head_of, last_hidden_state
from tsdkd.trainers.endings import end_probability
from tsdkd.trainers.guard import Guard
from tsdkd.trainers.metrics import Metrics
from tsdkd.trainers.routers import RouterLoss
from tsdkd.trainers.step import Step
from tsdkd.types import Head, LossTerms, ReadPlan, Rollouts, TokenBatch


class StepLoss:
    """`(student, step) → loss` of a micro-batch, in units of the whole step's counts; it owns the method's state.

    Args:
        method: whose loss it is.
        state: what of the method changes from step to step; None starts one outside of training.
        teacher_head: gives the teacher's head, on the device where the loss is computed; None without a teacher.
        device: where that is.
        pad_id: any id, for padding that no result depends on.
        engine: for `fused.evaluate` (`impl`, `gradient_filter`, …).
        metrics, guard: what is logged and watched; None is nothing.
        autocast: the mixed-precision context of the student's forward pass.
        gathered: makes the heads of models whole (ZeRO-3).
        scale: what the loss of a training step is multiplied by.
        router: the load-balancing loss of a mixture's routers; None is none.
        ends: the ids that end a completion, whose probability is logged.

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
        device: torch.device | str = "cpu",
        pad_id: int = 0,
        engine: Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
        guard: Guard | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        gathered: Callable[..., AbstractContextManager] = lambda *models: nullcontext(),
        scale: float = 1.0,
        router: RouterLoss | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self.method, self.state = method, method.start(None) if state is None else state
        self.teacher_head, self.device, self.pad_id = teacher_head, torch.device(device), pad_id
        self.engine = dict(engine or {})
        self.metrics, self.guard = metrics, guard
        self.autocast, self.gathered, self.scale, self.router = autocast, gathered, scale, router
        self.ends = ends
        self.seen: Callable[[Step, LossTerms], None] | None = None  # is told of each micro-batch that is trained on
        self.norms: dict[str, torch.Tensor] = {}  # each term's gradient, of when it was computed last
        self._observed: list[tuple[list[int], torch.Tensor]] = []
        self._sums: dict[str, torch.Tensor] = {}

    @staticmethod
    def step_of(method: Method, rollouts: Rollouts, teacher_hidden: list[torch.Tensor] | None = None) -> Step:
        """A whole step of rollouts that one caller holds; the teacher reads as far as the student, who reads what the method
        does."""
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
        with self.autocast():  # TRL's own forward runs outside of what accelerate put on `model.forward`
            batch = self.batch_of(student, step)
            with self._time(mode), self.gathered(student):
                terms = self._terms(self.method, batch, head_of(student), step)
                lengths = batch.lengths, step.rollouts.lengths
                self._add(mode, end_probability(batch.student_hidden, *lengths, head_of(student), self.ends))
                if term_norms is not None:
                    self._term_norms(batch, head_of(student), step, log=term_norms)
        self._add(mode, terms.sums)
        if mode == "eval":
            return terms.loss
        self.method.check_given(terms, self.state)
        if self.seen is not None:
            self.seen(step, terms)
        loss = terms.loss
        if self.router is not None:
            balance = self.router.take()
            self._add("train", {"loss/router": (balance.detach(), torch.ones_like(balance))})
            loss = loss + self.router.weight * self.router.share * balance
        if "corpus" in step.extra:
            with self.autocast():
                loss = loss + self._corpus(student, step)
        self._note(terms, step)
        if self.guard is not None:
            read = step.rollouts.first(step.plan.student)
            self.guard.watch_tokens("the student's hidden states", batch.student_hidden, read)
            if batch.teacher_hidden is not None:
                self.guard.watch_tokens("the teacher's hidden states", batch.teacher_hidden, read)
            for name in terms.terms:
                self.guard.watch(f"the {name} term", terms.sums[f"loss/{name}"][0])
            self.guard.watch("the loss", loss)
        return loss * self.scale

    def batch_of(self, student: nn.Module, step: Step) -> TokenBatch:
        """The student's forward pass over a micro-batch, and beside it what the teacher gave."""
        rollouts = step.rollouts.first(step.plan.student) if step.plan.is_cut else step.rollouts
        ids, mask, where = rollouts.padded(self.pad_id, self.device)
        read = last_hidden_state if self.router is None else self.router.read
        hidden = read(student, ids, mask).flatten(0, 1)[where]
        lengths, teacher = rollouts.lengths, None
        if step.teacher_hidden is not None:  # zeros stand where the teacher did not read
            parts = zip(step.teacher_hidden, lengths, strict=True)
            teacher = torch.cat([nn.functional.pad(part, (0, 0, 0, n - len(part))) for part, n in parts])
        return TokenBatch(
            hidden,
            teacher,
            tuple(lengths),
            token_ids=torch.tensor(rollouts.trained(rollouts.completion_ids), dtype=torch.long, device=self.device),
            rows=tuple(step.rows),
            recorded={
                name: torch.tensor(rollouts.trained(column), device=self.device) for name, column in rollouts.recorded.items()
            },
            plan=step.plan,
        )

    def _terms(self, method: Method, batch: TokenBatch, head: Head, step: Step) -> LossTerms:
        return method.loss(batch, head, self.teacher_head(), counts=step.counts, state=self.state, **self.engine)

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

    def _term_norms(self, batch: TokenBatch, head: Head, step: Step, log: bool) -> None:
        """The norm of each weighted term's gradient with respect to the student's last hidden states."""
        bias = None if head.bias is None else head.bias.detach()
        frozen = dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
        for term, weight in self.method.terms(self.state).items():
            if weight == 0:
                continue
            hidden = batch.student_hidden.detach().requires_grad_()
            alone = dataclasses.replace(batch, student_hidden=hidden)
            with torch.enable_grad():
                loss = self._terms(self.method.only(term), alone, frozen, step).loss
                (gradient,) = torch.autograd.grad(loss, hidden)
            norm = gradient.norm()
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
        self._observed.clear()
        self._sums.clear()

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

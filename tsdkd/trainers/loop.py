"""A step from prompt to gradient: the parts of a run, and the order in which they are called. Read this first.

    rows → Batch          completions.py   which rows, and completions that stand ready for them
    prompts → Written     completions.py   who writes
    rollouts → Step       scoring.py       counts of the whole step, what is read, the teacher's hidden states: once a step
    student, Step → loss  loss.py          for each micro-batch
    loss → go on or stop  guard.py         before the optimizer; then the method's state is told of the step

Every part owns its state; `checkpoints.py` knows which of it a checkpoint keeps.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tsdkd.methods import State
from tsdkd.teachers.itself import SelfTeacher
from tsdkd.teachers.several import SeveralTeachers
from tsdkd.trainers.beside import Engine
from tsdkd.trainers.checkpoints import Checkpoints, Kept, Stateful
from tsdkd.trainers.completions import Batch, CompletionSupply, Written
from tsdkd.trainers.corpus import Corpus
from tsdkd.trainers.coverage import Beside
from tsdkd.trainers.guard import Guard, NonFiniteError
from tsdkd.trainers.host import Host
from tsdkd.trainers.ignored import ignored_ids
from tsdkd.trainers.loss import StepLoss
from tsdkd.trainers.metrics import Metrics
from tsdkd.trainers.one_ahead import RolloutsAhead
from tsdkd.trainers.prefix import PrefixRollouts
from tsdkd.trainers.prompts import Limits, Prompts
from tsdkd.trainers.random_state import random_state, set_random_state
from tsdkd.trainers.routers import router_of
from tsdkd.trainers.scoring import StepScorer
from tsdkd.trainers.setup import Setup
from tsdkd.trainers.spending import spending_of
from tsdkd.trainers.spent import Spent
from tsdkd.trainers.step import Step
from tsdkd.trainers.teacher_of import Here
from tsdkd.trainers.teacher_prompts import TeacherPrompts
from tsdkd.types import Rollouts

logger = logging.getLogger(__name__)
NORMS_EVERY = 100  # optimizer steps


class Loop:
    """The collaborators of a run.

    Args:
        host: the trainer.
        setup: what was asked for.
        here: the teacher, or several.
        names: `student` and `teacher`, for messages.
        limits: of prompts and completions.
    """

    def __init__(self, host: Host, setup: Setup, here: Here, names: dict[str, str], limits: Limits) -> None:
        teacher, teacher_model = here.teacher, here.model
        method, args, accelerator = setup.method, setup.args, host.accelerator
        self.host, self.method, self.names = host, method, names
        self.asked: Callable[[], int] = lambda: 0  # the number of the signal that has come to this process
        self.stop_asked = False
        self.ahead: RolloutsAhead | None = None
        self.prefix, self.steps = PrefixRollouts.of(args.prefix_rollouts), 0
        self.ignored = ignored_ids(args.ignore_tokens, host.tokenizer, host.vocab_size)
        reader = teacher if method.reads_teacher else None
        corpus = None
        if method.pretraining_weight:
            corpus = Corpus(setup.pretraining_dataset, args.seed, limits.prompt + limits.completion)
        models = tuple(here.models.values())
        self.metrics = Metrics(accelerator, lambda: method.terms(self.state))
        self.spent = Spent(self.metrics)
        self.metrics.spent = self.spent.logged
        self.guard = Guard(accelerator, names)
        self.teacher_prompts = TeacherPrompts(host, setup, here, limits.completion)
        called = names["teacher"], self.metrics, self.teacher_prompts
        self.supply = CompletionSupply(host, setup.rollouts, teacher_model, teacher, *called)
        self.prompts = Prompts(host, limits, self.supply.check, self.teacher_prompts)
        counted = here.crossing, spending_of(host, setup), self.spent
        self.scorer = StepScorer(host, method, lambda: self.state, reader, self.metrics, corpus, *counted)
        self.loss = StepLoss(
            method,
            teacher_head=lambda: None if reader is None else reader.head,
            head_of=reader.head_of if isinstance(reader, SeveralTeachers) else None,
            device=accelerator.device,
            pad_id=host.tokenizer.pad_token_id,
            padding_free=args.padding_free,
            engine={"impl": args.fused_impl, "gradient_filter": args.gradient_filter},
            metrics=self.metrics,
            guard=self.guard,
            autocast=accelerator.autocast,
            gathered=lambda student: host.gathered_heads(student, *models),
            router=router_of(host),
            beside=Beside(host.eos_ids, lambda: None if self.ahead is None else self.ahead.engine),
            scale=accelerator.num_processes,  # counts are the whole step's, while DDP averages gradients over processes
        )
        self._remote = reader is not None and reader.is_remote
        self._start: tuple[Any, Any, int] | None = None
        self.scorer.rewind = self.rewind
        parts: dict[str, Stateful] = {"state": self.loss, "answers": self.supply}
        if args.token_budget is not None:
            parts["trained_tokens"] = self.metrics
        identity = {"method": method.name, "processes": accelerator.num_processes}
        kept: list[Kept] = [self.spent, *([teacher] if isinstance(teacher, SelfTeacher) else [])]
        self.checkpoints = Checkpoints(identity, accelerator.process_index, parts, kept)

    @property
    def state(self) -> State:
        """What of the method changes from step to step."""
        return self.loss.state

    def begin(self, max_steps: int) -> None:
        """A training run of so many steps starts, and the method's state with it."""
        self.stop_asked, self.steps = False, max_steps
        self.loss.begin(self.method.start(max_steps))
        self.guard.forget()
        if self.ahead is not None:
            self.ahead.forget()

    def write_ahead(self, engine: Engine) -> None:
        """Have an engine beside the training write each step's completions during the step before."""
        self.ahead = self.checkpoints.parts["rollouts_ahead"] = RolloutsAhead(self.host, engine, self.metrics)
        if self.scorer.spending is not None:
            made = self.scorer.spending.elsewhere | {"rollout"}
            self.scorer.spending = dataclasses.replace(self.scorer.spending, elsewhere=made)

    def fitted(self, rows: Any, role: str) -> Any:
        """Data that came after construction: what fits of them, with the teacher's completions where the method takes those."""
        if isinstance(rows, dict):
            return {name: self.fitted(part, f"{role}[{name!r}]") for name, part in rows.items()}
        return self.supply.ahead.fill(self.prompts.fit(rows, role), role)

    # ------------------------------------------------------------------ a step

    def rows(self, rows: list[dict[str, Any]]) -> Batch:
        """The rows of a generation batch, or others in their place."""
        self.prompts.check_rows(rows)
        if self._remote and self.host.mode == "train":
            self._start = random_state(), copy.deepcopy(self.supply.state_dict()), self.metrics.state_dict()
        return self.supply.rows(rows)

    def write(self, batch: Batch, prompt_ids: list[list[int]], by_student: Any) -> Written:
        """The batch's completions; on every process a student whose logits are not finite stops here.

        Raises:
            NonFiniteError: naming the student.
        """
        failure, written = None, Written([[] for _ in prompt_ids])
        self.scorer.written = self.supply.writers(batch)
        if self.ahead is not None and self.host.mode == "train":
            by_student = self.ahead.take
        elif self.ahead is not None:
            self.ahead.settle()
        host, longest = self.host, None
        if self.prefix is not None and host.mode == "train" and host.training:
            longest = self.prefix.longest(host.step, self.steps, host.args.seed)
        try:
            with host.cut(longest):
                written = self.supply.write(batch, prompt_ids, by_student)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            failure = error
        if self.host.any_process(failure is not None):
            raise NonFiniteError(
                f"step {self.host.step + 1}: NaN or Inf in the student's logits while it wrote its completions (student: "
                f"{self.names['student']}). The last step made its weights diverge, nothing was saved since: lower the "
                "learning rate, or go back to a checkpoint."
            ) from failure
        return written

    def prepare(self, rollouts: Rollouts) -> Step:
        """The step of a generation batch's rollouts, once for all its micro-batches."""
        return self.scorer.prepare(rollouts)

    def compute(self, student: nn.Module, step: Step) -> torch.Tensor:
        """A micro-batch's loss."""
        host = self.host
        every, norms = host.args.term_grad_norm_steps, None
        if host.mode == "train" and host.micro_step == 0:
            if every and host.step % every == 0:
                norms = True
            elif host.step % NORMS_EVERY == 0 and len(self.method.terms(self.state)) > 1:
                norms = False  # for the run's table and its health, on one micro-batch
        return self.loss(student, step, mode=host.mode, term_norms=norms)

    def before_optimizer_step(self, grad_norm: torch.Tensor | float | None) -> None:
        """Once an optimizer step, before the weights change; a signal to any process is every process's from here on."""
        self.metrics.step_made()
        asked = torch.tensor(float(self.asked() > 0))
        tflops = self.spent.numbers
        *numbers, signals = self.check_gradient_norm(grad_norm, [*tflops, *self.loss.numbers, asked])
        self.stop_asked = signals > 0
        self.spent.step_made(numbers[: len(tflops)])
        self.loss.step_made(self.host.step + 1, numbers[len(tflops) :], self.host.accelerator.gather)

    def check_gradient_norm(
        self, grad_norm: torch.Tensor | float | None, numbers: list[torch.Tensor] | None = None
    ) -> list[float]:
        """What the guard has seen since its last check, and the norm; the sums of `numbers` over all processes."""
        # A loss scaler skips steps with infinite gradients by itself.
        norm = None if self.host.accelerator.scaler is not None else grad_norm
        return self.guard.check(self.host.step + 1, norm, numbers or [])

    def rewind(self) -> None:
        """Put draws, completions that are kept and counts back to the start of the step in hand, which is not made."""
        if self._start is None:
            return
        draws, supplied, tokens = self._start
        set_random_state(draws)
        if supplied is not None:
            self.supply.load_state_dict(supplied)
        self.metrics.load_state_dict(tokens)
        if self.ahead is not None:
            self.ahead.rewind()

    # ------------------------------------------------------------------ beside the steps

    def window(self, mode: str) -> dict[str, float]:
        """The metrics of a logging window."""
        return self.metrics.window(mode)

    def after_evaluation(self, metrics: dict[str, float], prefix: str) -> None:
        """What follows an evaluation's loss during training."""
        if "loss" in metrics and self.host.training:
            self.supply.source.evaluated(metrics["loss"], prefix)
            self.state.after_evaluation(metrics["loss"], prefix)

"""From a generation batch's rollouts to its `Step`: counts of the whole step, what is read, and what the teacher gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tsdkd.fused import token_statistics
from tsdkd.methods import Method, State
from tsdkd.teachers import Teacher, TeacherUnavailable, head_of, hidden_of
from tsdkd.trainers.corpus import Corpus
from tsdkd.trainers.crossing import Crossing
from tsdkd.trainers.health import repetition
from tsdkd.trainers.host import Host, teacher_batches
from tsdkd.trainers.metrics import Metrics
from tsdkd.trainers.spending import Spending
from tsdkd.trainers.spent import Spent
from tsdkd.trainers.step import Step
from tsdkd.types import Counts, Objective, ReadPlan, Rollouts, TokenBatch


class StepScorer:
    """Asks the teacher once an optimizer step, before the student's micro-batches.

    Args:
        host: the trainer.
        method, state: whose terms say what is counted and read; the state of now.
        teacher: None where no term reads one.
        metrics: what is logged.
        corpus: texts for a loss beside the completions.
        crossing: of a teacher of another tokenizer.
        spending: counts the step's FLOPs.
        spent: is told of them.
    """

    def __init__(
        self,
        host: Host,
        method: Method,
        state: Callable[[], State],
        teacher: Teacher | None,
        metrics: Metrics,
        corpus: Corpus | None = None,
        crossing: Crossing | None = None,
        spending: Spending | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.host, self.method, self.state, self.teacher = host, method, state, teacher
        self.metrics, self.corpus, self.crossing = metrics, corpus, crossing
        self.spending, self.spent = spending, spent
        self.written: tuple[str, ...] = ("student",)  # whose forward passes wrote: what is given costs no rollout
        self.rewind: Callable[[], None] = lambda: None  # puts everything that changes back to the step's start
        self.whole = False  # a recording keeps whole completions, for methods that read more than this one

    def prepare(self, rollouts: Rollouts) -> Step:
        """The step of a generation batch's rollouts. Every process must call this.

        Raises:
            TeacherUnavailable: on every process, after a checkpoint was saved.
        """
        host, lengths = self.host, rollouts.lengths
        self._log(rollouts)
        plan = ReadPlan.whole(lengths) if self.whole else self.method.reads(lengths, self.state())
        theirs = rollouts.for_teacher
        if self.crossing is not None:
            theirs, plan = self.crossing.pair(rollouts)
            self.metrics.add_host(host.mode, "teacher/paired", sum(plan.teacher), sum(plan.lengths))
        if plan.is_cut:
            self._spared(rollouts, rollouts.first(plan.student))
        counts, extra = self._counts(plan), {}
        if self.corpus is not None and host.mode == "train":
            extra["corpus"], tokens = self._texts(len(lengths))
            counts = dataclasses.replace(counts, divisors={**counts.divisors, "pretraining": tokens})
        first = (host.step * host.accelerator.num_processes + host.accelerator.process_index) * len(lengths)
        rows = [first + row for row in range(len(lengths))]
        hidden, by_rule = None, self.teacher is not None and plan.rule is not None
        if self.teacher is not None:
            plan = self._with_rule(rollouts, plan)
            hidden = self._hidden(self.teacher, theirs, plan)
        if self.spending is not None and self.spent is not None and host.mode == "train":
            more = [len(ids) for ids in extra.get("corpus", []) if ids]
            flops = self.spending.of(rollouts, theirs, plan, self.written, texts=more, read_first=by_rule)
            self.metrics.computed(flops, self.spending.peak, self.spending.elsewhere)
            self.spent.prepared(flops)
        return Step(rollouts, counts, rows, plan, hidden, extra)

    def _log(self, rollouts: Rollouts) -> None:
        host, lengths = self.host, rollouts.lengths
        empty = float(sum(length == 0 for length in lengths))
        self.metrics.add_host(host.mode, "completions/empty", empty, 1 / host.accelerator.num_processes)
        own = (rollouts.rows([row]) for row in range(len(rollouts)))
        repeated = sum(repetition(one.trained(one.completion_ids)) for one in own)  # without what tools said
        self.metrics.add_host(host.mode, "completions/repetition", repeated, len(lengths))
        if "accepted" in rollouts.recorded:
            accepted = rollouts.trained(rollouts.recorded["accepted"])
            self.metrics.add_host(host.mode, "speculative/acceptance", sum(accepted), len(accepted))

    def _counts(self, plan: ReadPlan) -> Counts:
        """The step's counts over all processes; of an evaluation's batch its own."""
        host, lengths = self.host, plan.lengths
        paired = () if plan.paired is None else (plan.paired,)
        own = self.method.counts(lengths, self.state(), *paired).to_dict()
        total = torch.tensor(list(own.values()), dtype=torch.float32, device=host.accelerator.device)
        if host.mode == "train":
            total = host.accelerator.reduce(total, reduction="sum")
            self.metrics.step_prepared(sum(lengths), total[0])  # the tokens come first
        return Counts.from_dict(dict(zip(own, total, strict=True)))

    def _spared(self, rollouts: Rollouts, short: Rollouts) -> None:
        read = (rollouts.for_teacher, short.for_teacher)
        before, after = (sum(map(len, r.prompt_ids)) + sum(map(len, r.completion_ids)) for r in read)
        self.metrics.add_host(self.host.mode, "teacher/tokens_spared", before - after, before)

    def _with_rule(self, rollouts: Rollouts, plan: ReadPlan) -> ReadPlan:
        """The plan once its rule has been asked, on the student's statistics: the student reads first."""
        if plan.rule is None:
            return plan
        host = self.host
        device = host.accelerator.device
        with self.metrics.time(host.mode, "teacher"), host.student() as student:
            batches = teacher_batches(host.args, host.accelerator)
            hidden = hidden_of(student, rollouts, 0, batches, device, host.accelerator.autocast)
            batch = TokenBatch(torch.cat(hidden), None, tuple(rollouts.lengths))
            alone = Objective((), plan.temperature)
            head = head_of(student).cut(host.vocab_size)
            statistics = token_statistics(batch, head, None, objective=alone, impl=host.args.fused_impl)
        plan = plan.with_teacher(plan.rule(statistics).sum(-1).tolist())
        self._spared(rollouts, rollouts.first(plan.teacher))
        return plan

    def _hidden(self, teacher: Teacher, read: Rollouts, plan: ReadPlan) -> list[torch.Tensor]:
        """The teacher's hidden states of what it reads; a teacher that is gone ends the run on every process, after saving."""
        host, hidden, failure = self.host, [], None
        try:
            with self.metrics.time(host.mode, "teacher"):
                hidden = teacher.hidden(read, plan.teacher)
        except TeacherUnavailable as error:
            failure = error
        if teacher.is_remote and host.any_process(failure is not None):
            if host.training and host.step:
                self.rewind()  # the step was not made
                host.save_now()
            told = failure or "the teacher of another process did not answer; see its message."
            raise TeacherUnavailable(f"step {host.step + 1}: {told}") from failure
        return hidden

    def _texts(self, rows: int) -> tuple[list[list[int]], torch.Tensor]:
        """This step's texts of the corpus, and how many tokens all processes predict."""
        host = self.host
        assert self.corpus is not None
        texts = self.corpus.draw(rows, host.step, host.accelerator.process_index)
        ids = self.corpus.ids(texts, host.rendering.texts)
        tokens = torch.tensor(float(sum(len(row) - 1 for row in ids if row)), device=host.accelerator.device)
        return ids, host.accelerator.reduce(tokens, reduction="sum")

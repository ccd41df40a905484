"""The autograd function and its one loop over chunks of tokens: each head is projected once.

For a chunk: project both heads, sweep the rows (statistics, and the direct term's gradient in place of the student's
logits), weigh them by the gate, and add the two gradient products. What depends on other tokens comes after the last
chunk and is small: the ranking term touches k columns of the opener's rows, the entropy term ρ of the rows. A direct term
on selected tokens is swept there only, after what its selection reads; a teacher whose distribution no term reads is not
projected, its scores of the candidates are gathered.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tsdkd.fused.chunks import choose_chunk, reads_are_free
from tsdkd.fused.gradients import Gradients, Side, compute_dtype, whole
from tsdkd.fused.reference import (
    Layout,
    assemble,
    coefficients,
    decide,
    local_counts,
    needs_of,
    select,
    teacher_scope,
    unread,
)
from tsdkd.fused.tiles_torch import RowStatistics, Shape
from tsdkd.losses import kendall_tau, plackett_luce_nll, teacher_mass, teacher_order
from tsdkd.losses.reduction import divide, response_coefficients, token_coefficients
from tsdkd.selection import counted
from tsdkd.types import Counts, Head, LossTerms, Objective, TokenBatch, TokenStatistics

logger = logging.getLogger(__name__)
_announced: set[tuple] = set()

# Elements of a gathered piece of a head, [rows, k, hidden].
_GATHERED = 1 << 22


@dataclass
class Call:
    """One evaluation: what goes in, and what the function leaves behind for `LossTerms`."""

    objective: Objective
    batch: TokenBatch
    counts: Counts | None
    student_head: Head
    teacher_head: Head | None
    chunk_tokens: int | str
    gradient_filter: float
    tiles: ModuleType
    with_gradient: bool
    terms: LossTerms | None = None


def side_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: Head, work: torch.dtype) -> Side:
    """A model's operands, in the dtype of the products; nothing of it carries a gradient."""
    dtype = compute_dtype(hidden, weight)
    offset = None if bias is None else bias.detach()[: head.size].to(work)
    shape = Shape(offset, head.logit_scale, head.softcap)
    return Side(hidden.detach().to(dtype), weight.detach()[: head.size].to(dtype), shape)


def needed_ahead(objective: Objective) -> str:
    """What has to be known of all tokens before the direct term's sweep: `"none"`, the `"student"`'s statistics or `"both"`.

    The direct term's own sweep gives the statistics of the tokens that it takes.
    """
    scope, direct = teacher_scope(objective), objective.direct_weight != 0
    needs = {needs_of(objective.gate, "token"), needs_of(objective.selection, "both")} if direct else set()
    if "both" in needs or (scope == "all" and not (direct and objective.selection is None)):
        return "both"
    alone = scope == "none" and objective.sampled is not None and objective.opener is None and objective.top_entropy is None
    return "student" if "student" in needs or (scope != "all" and not alone) else "none"


def _announce_price(objective: Objective, needs: str) -> None:
    """Say once what a gate or a selection costs that reads other tokens."""
    for kind, rule in (("gate", objective.gate), ("selection", objective.selection)):
        announcement = (kind, type(rule), needs)
        if rule is not None and needs_of(rule, "token") == needs and announcement not in _announced:
            _announced.add(announcement)
            what = "the student's head" if needs == "student" else "both heads"
            logger.info("the %s reads other tokens (needs=%r): every step projects %s ahead of the loss.", kind, needs, what)


def _kept_rows(mask: torch.Tensor, count: int | None) -> torch.Tensor:
    """Where a packed mask is True. On a device whose reads wait, `count` spares one; without it every row is kept."""
    if reads_are_free(mask.device):
        return mask.nonzero()[:, 0]
    return torch.arange(len(mask), device=mask.device) if count is None else torch.nonzero_static(mask, size=count)[:, 0]


def _static_count(rule: Any, lengths: tuple[int, ...]) -> int | None:
    """How many tokens a selection keeps, where lengths alone tell; 0 of none."""
    if rule is None:
        return 0
    count = getattr(rule, "count", None)
    return None if count is None else sum(count(length) for length in lengths)


class _Run:
    """One forward pass of the objective over its chunks, gradients included."""

    def __init__(self, call: Call, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted) -> None:
        self.call, self.objective, self.lengths = call, call.objective, call.batch.lengths
        self.work = torch.promote_types(torch.float32, hidden.dtype)
        self.student = side_of(hidden, weight, bias, call.student_head, self.work)
        self.teacher: Side | None = None
        if call.teacher_head is not None and call.batch.teacher_hidden is not None:
            head = call.teacher_head
            offset = None if head.bias is None else whole(head.bias)
            self.teacher = side_of(call.batch.teacher_hidden, whole(head.weight), offset, head, self.work)
        self.tokens, self.device = hidden.shape[0], hidden.device
        vocab = self.student.weight.shape[0]
        k = min(self.objective.num_candidates if self.objective.opener is not None else 1, vocab)
        like = self.student.hidden.new_zeros((), dtype=self.work)
        self.statistics = RowStatistics.empty(self.tokens, k, like)
        self.sampled = self.statistics.divergence.clone()
        self.layout = Layout(self.lengths, self.device)
        self.readable = None if call.batch.teacher_lengths is None else call.batch.readable()
        self.static = _static_count(self.objective.top_entropy, self.lengths)
        self.static_direct = _static_count(self.objective.selection, self.lengths)
        self.divisors = call.counts
        tokens = sum(self.lengths) if call.counts is None else call.counts.tokens
        self.unit = divide(like + 1.0, tokens)
        self.wanted = any(wanted)
        self.gradients = Gradients(self.student, weight.shape[0], wanted, self.work, call.gradient_filter, self.unit)
        item = self.student.hidden.element_size()
        self.chunk = min(choose_chunk(call.chunk_tokens, self.tokens, vocab, item, self.device), max(1, self.tokens))
        self._buffers: dict[str, torch.Tensor] = {}

    def _chunks(self, rows: torch.Tensor | None = None) -> list:
        """All tokens, or some `rows`, chunk by chunk."""
        if rows is not None:
            return list(rows.split(self.chunk))
        return [slice(start, min(start + self.chunk, self.tokens)) for start in range(0, self.tokens, self.chunk)]

    def _project(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        side = self.student if name == "student" else self.teacher
        assert side is not None
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.chunk, side.weight.shape[0], dtype=side.weight.dtype, device=self.device)
        return side.project(rows, self._buffers[name])

    def sweep(self, rows: slice | torch.Tensor, both: bool, with_gradient: bool) -> tuple[torch.Tensor, RowStatistics]:
        """The statistics of some rows, and the student's products, overwritten by the divergence's gradient if wanted."""
        logits = self._project("student", rows)
        into = self.statistics.rows(rows.start, rows.stop) if isinstance(rows, slice) else self.statistics.blank(len(rows))
        self.call.tiles.sweep(
            logits,
            self._project("teacher", rows) if both else None,
            student_shape=self.student.shape,
            teacher_shape=self.teacher.shape if self.teacher is not None else Shape(),
            divergence=self.objective.divergence,
            parameter=self.objective.divergence_parameter,
            temperature=self.objective.temperature,
            statistics=into,
            with_gradient=with_gradient,
        )
        if not isinstance(rows, slice):
            self.statistics.put(rows, into)
        return logits, into

    def padded(self) -> TokenStatistics:
        """The rows' statistics laid out by response."""
        pad, statistics, rows = self.layout.pad, self.statistics, self.call.batch.rows
        seen = TokenStatistics(self.layout.mask, pad(statistics.student_entropy), rows=rows)
        if self.teacher is None:
            return seen
        return TokenStatistics(
            mask=seen.mask,
            student_entropy=seen.student_entropy,
            teacher_entropy=pad(statistics.teacher_entropy),
            divergence=pad(statistics.divergence),
            top1_agreement=pad(statistics.agreement),
            rows=rows,
        )

    def read_ahead(self) -> None:
        """What the direct term's rules read of other tokens, and what its own sweep will not give."""
        self.ahead = needed_ahead(self.objective)
        if self.ahead != "none":
            _announce_price(self.objective, self.ahead)
            for rows in self._chunks():
                self.sweep(rows, both=self.ahead == "both", with_gradient=False)

    def direct_term(self) -> None:
        """Sweep the direct term's tokens; `selected` is their mask."""
        objective = self.objective
        seen = self.padded() if self.ahead != "none" or objective.selection is not None else None
        if not objective.direct_weight:
            self.selected = torch.zeros_like(self.layout.mask)
            return
        self.selected = self.layout.mask if seen is None else select(objective, seen, self.readable)
        if self.ahead == "both" and not self.wanted:
            return
        gate_ahead = None
        if needs_of(objective.gate, "token") in ("student", "both"):
            assert objective.gate is not None and seen is not None
            whole_view = needs_of(objective.gate, "token") == "both"
            gate_ahead = self.layout.pack(objective.gate(seen if whole_view else seen.of_student())).to(self.work)
        rows, share = None, None
        if objective.selection is not None:
            packed = self.layout.pack(self.selected)
            rows = _kept_rows(packed, self.static_direct)
            of = token_coefficients if counted(objective.selection) else response_coefficients
            share = self.layout.pack(of(self.selected, self.work))
        divisor = None if self.divisors is None else self.divisors.of_direct
        if divisor is None:
            divisor = self.layout.mask.any(-1).sum() if not counted(objective.selection) else self.selected.sum()
        scale = divide(self.unit.new_full((), objective.direct_weight), divisor)
        for part in self._chunks(rows):
            logits, into = self.sweep(part, both=True, with_gradient=self.wanted)
            if self.wanted:
                gate = _gate_of(objective, into) if gate_ahead is None else gate_ahead[part]
                self.gradients.add_rows(part, logits, gate * scale if share is None else gate * share[part] * scale)

    def sampled_term(self) -> None:
        """The term on the tokens that were sampled; it reads the student alone."""
        objective, ids = self.objective, self.call.batch.token_ids
        if objective.sampled is None:
            return
        assert ids is not None, "a term on sampled tokens needs TokenBatch.token_ids"
        scale = divide(self.unit.new_full((), objective.sampled_weight), self._divisor("tokens"))
        for rows in self._chunks():
            logits = self._project("student", rows)
            log_p, entropy = self.call.tiles.sampled_gradient(
                logits, ids[rows], student_shape=self.student.shape, temperature=objective.temperature, work=self.work
            )
            if self.ahead == "none" and not objective.direct_weight:
                self.statistics.student_entropy[rows] = entropy
            with torch.enable_grad():
                leaf = log_p.requires_grad_()
                values = objective.sampled(leaf, rows)
                (slope,) = torch.autograd.grad(values.sum(), leaf)
            self.sampled[rows] = values.detach()
            if self.wanted:
                self.gradients.add_rows(rows, logits, slope * scale)

    def _divisor(self, name: str) -> torch.Tensor | float:
        """A count of the step, or of these tokens where none was given."""
        return getattr(self.divisors if self.divisors is not None else self.own, name)

    @property
    def own(self) -> Counts:
        """The counts of these tokens that lengths tell."""
        return Counts(sum(self.lengths), self.static or 0, sum(length > 0 for length in self.lengths))

    def finish(self) -> LossTerms:
        """What depends on other tokens, and the result."""
        objective, statistics = self.objective, self.statistics
        scope = teacher_scope(objective)
        scored = {"all": self.layout.mask, "selected": self.selected, "none": None}[scope]
        padded = unread(self.padded(), scored)
        weights = decide(objective, padded, self.selected, self.readable)
        own = local_counts(objective, weights, self.layout.mask)
        if self.static is not None and (objective.selection is None or self.static_direct is not None):
            # Known on the host: nothing is read back.
            known = self.own
            whole_or_part = sum(self.lengths) if objective.selection is None else self.static_direct
            direct = whole_or_part if objective.direct_weight else 0
            own = Counts(known.tokens, known.selected, known.responses, direct)
        divisors = own if self.divisors is None else self.divisors
        scales = coefficients(objective, weights, self.layout.mask)
        nll, tau = torch.zeros_like(statistics.divergence), torch.zeros_like(statistics.divergence)
        if objective.opener is not None and self.teacher is not None:
            opener = self.layout.pack(weights.opener)
            if scope != "all":
                self._gather_teacher_scores(_kept_rows(opener, None))
            scale = self.layout.pack(scales[0]) * divide(self.unit.new_full((), objective.indirect_weight), divisors.responses)
            nll, tau = self._ranking(opener, scale)
        if self.wanted and objective.top_entropy is not None:
            scale = self.layout.pack(scales[2]) * divide(self.unit.new_full((), objective.entropy_weight), divisors.selected)
            if objective.entropy_target == "teacher":
                scale = scale * (statistics.student_entropy > statistics.teacher_entropy)
            for part in _kept_rows(self.layout.pack(weights.top_entropy), self.static).split(self.chunk):
                logits = self._project("student", part)
                self.call.tiles.entropy_gradient(
                    logits, student_shape=self.student.shape, temperature=objective.temperature, work=self.work
                )
                self.gradients.add_rows(part, logits, scale[part])
        divergence = torch.zeros_like(padded.student_entropy) if padded.divergence is None else padded.divergence
        pad = self.layout.pad
        per_token = pad(nll), divergence, padded.student_entropy, pad(self.sampled)
        tau = torch.where(weights.opener, pad(tau), 0.0)
        terms = assemble(objective, per_token, padded, weights, tau, own, divisors)
        if self.gradients.columns:
            skipped, columns = (torch.tensor(float(n)) for n in (self.gradients.skipped, self.gradients.columns))
            terms.sums["gradient_filter/skipped"] = (skipped, columns)
        return terms

    def _gather_teacher_scores(self, rows: torch.Tensor) -> None:
        """The teacher's logits of the candidates of some rows: k rows of its head a token, not the whole."""
        assert self.teacher is not None
        ids = self.statistics.candidates
        for part in rows.split(max(1, _GATHERED // max(1, ids.shape[1] * self.teacher.hidden.shape[1]))):
            self.statistics.teacher_scores[part] = self.teacher.scores(part, ids[part], self.work)

    def _ranking(self, opener: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row's Plackett-Luce loss and tau, and the opener's gradient: k columns of its rows."""
        statistics, uniform = self.statistics, self.objective.ranking_stage_weights == "uniform"
        order = teacher_order(statistics.teacher_scores)
        stages = None if uniform else teacher_mass(statistics.teacher_scores.gather(1, order))
        with torch.enable_grad():
            scores = statistics.student_scores.gather(1, order).requires_grad_()
            nll = plackett_luce_nll(scores, stages)
            (slope,) = torch.autograd.grad(nll.sum(), scores)
        if self.wanted:
            # Where a read would wait for the device every row goes, with a scale of 0 off the opener.
            step = max(1, _GATHERED // max(1, order.shape[1] * self.student.hidden.shape[1]))
            for part in _kept_rows(opener, None).split(step):
                ranked = scores.detach()[part]
                ids = statistics.candidates[part].gather(1, order[part])
                gradient = slope[part] * self.student.shape.slope(ranked) * scale[part].unsqueeze(-1)
                self.gradients.add_columns(part, ids, gradient)
        return nll.detach(), kendall_tau(order).to(self.work)


def _gate_of(objective: Objective, statistics: RowStatistics) -> torch.Tensor:
    """The gate of some rows; a gate reads its own row only."""
    ones = torch.ones_like(statistics.divergence)
    if objective.gate is None:
        return ones
    rows = TokenStatistics(
        mask=ones.bool().unsqueeze(0),
        student_entropy=statistics.student_entropy.unsqueeze(0),
        teacher_entropy=statistics.teacher_entropy.unsqueeze(0),
        divergence=statistics.divergence.unsqueeze(0),
        top1_agreement=statistics.agreement.unsqueeze(0),
    )
    return objective.gate(rows)[0].to(ones.dtype)


class FusedObjective(torch.autograd.Function):
    """The loss as one node: its gradients are computed in the forward pass, chunk by chunk, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call) -> torch.Tensor:
        wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        if not call.with_gradient:
            wanted = (False, False, False)
        run = _Run(call, hidden, weight, bias, wanted)  # reads what autocast says
        with torch.autocast(hidden.device.type, enabled=False):
            run.read_ahead()
            run.direct_term()
            run.sampled_term()
            call.terms = run.finish()
        ctx.gradients = run.gradients if any(wanted) else None
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.spent = False
        return call.terms.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        if ctx.spent:
            raise RuntimeError(
                "the fused loss was backpropagated a second time: its gradients are computed in the forward pass and freed by "
                "the first backward. Call the loss again, or use impl='reference'."
            )
        ctx.spent = True
        gradients, ctx.gradients = ctx.gradients, None
        made = []
        grad_output = grad_output * gradients.unit
        for gradient, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True):
            made.append(None if gradient is None else gradient.mul_(grad_output).to(dtype))
        return (*made, None)


def evaluate(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head | None,
    counts: Counts | None,
    tiles: ModuleType,
    chunk_tokens: int | str,
    gradient_filter: float,
) -> LossTerms:
    """An objective from hidden states and heads that are cut to the shared vocabulary."""
    call = Call(
        objective=objective,
        batch=batch,
        counts=counts,
        student_head=student_head,
        teacher_head=teacher_head,
        chunk_tokens=chunk_tokens,
        gradient_filter=gradient_filter,
        tiles=tiles,
        with_gradient=torch.is_grad_enabled(),
    )
    weight = whole(student_head.weight)
    bias = None if student_head.bias is None else whole(student_head.bias)
    loss = FusedObjective.apply(batch.student_hidden, weight, bias, call)
    assert call.terms is not None
    call.terms.loss = loss
    return call.terms

"""One forward pass of an objective over its chunks of tokens, gradients included: each head is projected once.

For a chunk: project both heads, sweep the rows (statistics, and the divergence's gradient in place of the student's
logits), weigh them by the gate, and add the two gradient products. What depends on other tokens comes after the last
chunk and is small: a ranking touches k columns of its rows, an entropy term ρ of the rows. A divergence on selected
tokens is swept there only, after what its selection reads; a teacher whose distribution no term reads is not projected,
its scores of the candidates are gathered. A second divergence term is swept by itself, for another projection.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType

import torch

from tsdkd.fused.chunks import choose_chunk, reads_are_free
from tsdkd.fused.decide import Layout, Taken, assemble, decide, scored_tokens, select, unread
from tsdkd.fused.gradients import Gradients, Operands, compute_dtype, whole
from tsdkd.fused.reads import announce_price, dense_terms, needed_ahead, teacher_scope
from tsdkd.fused.reference import MEASURE
from tsdkd.fused.tiles_torch import LogitTransform, RowStatistics, written_tile
from tsdkd.losses import kendall_tau, plackett_luce_nll, teacher_mass, teacher_order
from tsdkd.losses.reduction import divide
from tsdkd.types import (
    Counts,
    Divergence,
    DivergenceTerm,
    EntropyTerm,
    Head,
    LossTerms,
    Objective,
    RankingTerm,
    SampledTerm,
    TokenBatch,
    TokenStatistics,
)

# Elements of a gathered piece of a head, [rows, k, hidden].
_GATHERED = 1 << 22

# Tokens that are ranked at a time, k² numbers each.
_RANKED = 4096

# Buffers [chunk, vocab] of a divergence that autograd differentiates, beside both models' logits.
_AUTOGRAD_BUFFERS = 10


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


def operands_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: Head, work: torch.dtype
) -> Operands:
    """A model's operands, in the dtype of the products; nothing of it carries a gradient."""
    dtype = compute_dtype(hidden, weight)
    offset = None if bias is None else bias.detach()[: head.size].to(work)
    transform = LogitTransform(offset, head.logit_scale, head.softcap)
    return Operands(hidden.detach().to(dtype), weight.detach()[: head.size].to(dtype), transform)


def _kept_rows(mask: torch.Tensor, count: int | None) -> torch.Tensor:
    """Where a packed mask is True. On a device whose reads wait, `count` spares one; without it every row is kept."""
    if reads_are_free(mask.device):
        return mask.nonzero()[:, 0]
    return torch.arange(len(mask), device=mask.device) if count is None else torch.nonzero_static(mask, size=count)[:, 0]


class Run:
    """One forward pass of the objective; `finish` gives its result, `gradients` what it leaves for the backward."""

    def __init__(self, call: Call, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted) -> None:
        self.call, self.objective, self.lengths = call, call.objective, call.batch.lengths
        self.dense = dense_terms(self.objective)
        self.measure = self.objective.divergence or MEASURE
        self.work = torch.promote_types(torch.float32, hidden.dtype)
        self.student = operands_of(hidden, weight, bias, call.student_head, self.work)
        self.teacher: Operands | None = None
        if call.teacher_head is not None and call.batch.teacher_hidden is not None:
            head = call.teacher_head
            offset = None if head.bias is None else whole(head.bias)
            self.teacher = operands_of(call.batch.teacher_hidden, whole(head.weight), offset, head, self.work)
        self.tokens, self.device = hidden.shape[0], hidden.device
        vocab = self.student.weight.shape[0]
        ranked = [term.num_candidates for term in self.objective.active if isinstance(term, RankingTerm)]
        like = self.student.hidden.new_zeros((), dtype=self.work)
        self.statistics = RowStatistics.empty(self.tokens, max(ranked, default=1), like)
        self.values: dict[str, torch.Tensor] = {}
        self.taken: dict[str, torch.Tensor] = {}
        self.layout = Layout(self.lengths, self.device)
        self.readable = call.batch.readable()
        self.own = self.objective.counts(self.lengths, call.batch.paired)
        self.divisors = self.own if call.counts is None else call.counts
        self.unit = divide(like + 1.0, self.divisors.tokens)
        self.wanted = any(wanted)
        self.gradients = Gradients(self.student, weight.shape[0], wanted, self.work, call.gradient_filter, self.unit)
        by_autograd = any(written_tile(term.divergence) is None for term in self.dense)
        chunk = choose_chunk(
            call.chunk_tokens,
            self.tokens,
            vocab,
            self.student.hidden.element_size(),
            self.device,
            buffers=2 + (_AUTOGRAD_BUFFERS if by_autograd else 0),
        )
        self.chunk = min(chunk, max(1, self.tokens))
        self._buffers: dict[str, torch.Tensor] = {}

    def _chunks(self, rows: torch.Tensor | None = None) -> list:
        """All tokens, or some `rows`, chunk by chunk."""
        if rows is not None:
            return list(rows.split(self.chunk))
        return [slice(start, min(start + self.chunk, self.tokens)) for start in range(0, self.tokens, self.chunk)]

    def _project(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        model = self.student if name == "student" else self.teacher
        assert model is not None
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.chunk, model.weight.shape[0], dtype=model.weight.dtype, device=self.device)
        return model.project(rows, self._buffers[name])

    def _sweep(
        self, rows: slice | torch.Tensor, divergence: Divergence, into: RowStatistics, both: bool, with_gradient: bool
    ) -> torch.Tensor:
        """The statistics of some rows, and the student's products, overwritten by the divergence's gradient if wanted."""
        logits = self._project("student", rows)
        self.call.tiles.sweep(
            logits,
            self._project("teacher", rows) if both else None,
            student_transform=self.student.transform,
            teacher_transform=self.teacher.transform if self.teacher is not None else LogitTransform(),
            divergence=divergence,
            temperature=self.objective.temperature,
            statistics=into,
            with_gradient=with_gradient,
        )
        return logits

    def sweep(self, rows: slice | torch.Tensor, both: bool, with_gradient: bool) -> tuple[torch.Tensor, RowStatistics]:
        """`_sweep` of the objective's own divergence, whose statistics are kept."""
        into = self.statistics.rows(rows.start, rows.stop) if isinstance(rows, slice) else self.statistics.blank(len(rows))
        logits = self._sweep(rows, self.measure, into, both, with_gradient)
        if not isinstance(rows, slice):
            self.statistics.put(rows, into)
        return logits, into

    def padded(self) -> TokenStatistics:
        """The rows' statistics laid out by completion."""
        pad, statistics, rows = self.layout.pad, self.statistics, self.call.batch.rows
        seen = TokenStatistics(self.layout.mask, pad(statistics.student_entropy), rows=rows)
        if self.teacher is None:
            return seen
        return dataclasses.replace(
            seen,
            teacher_entropy=pad(statistics.teacher_entropy),
            divergence=pad(statistics.divergence),
            top1_agreement=None if self.objective.own_vocabularies else pad(statistics.agreement),
        )

    def scale(self, term) -> torch.Tensor:
        """What a term's coefficients are multiplied by in the loss: its weight over its divisor."""
        return divide(self.unit.new_full((), term.weight), self.divisors.of(term))

    # ------------------------------------------------------------------ in order

    def read_ahead(self) -> None:
        """What the divergences' rules read of other tokens, and what their own sweeps will not give."""
        self.ahead = needed_ahead(self.objective)
        if self.ahead == "none" and self.call.batch.paired is not None:
            self.ahead = "student"  # the sweep of the pairs does not give the statistics of the other tokens
        if self.ahead != "none":
            announce_price(self.objective)
            for rows in self._chunks():
                self.sweep(rows, both=self.ahead == "both", with_gradient=False)

    def divergence_term(self, term: DivergenceTerm) -> None:
        """Sweep a divergence's tokens."""
        first = term is self.dense[0]
        rules = {kind: rule.reads for kind, rule in term.rules}
        known = self.ahead != "none" or term.selection is not None or not first
        seen = self.padded() if known else None
        tokens = self.layout.mask if self.readable is None else self.readable
        if term.selection is not None:
            assert seen is not None
            tokens = select(term, seen, self.readable)
        self.taken[term.name] = tokens
        if first:
            self.values[term.name] = self.statistics.divergence  # filled below, or ahead
            if self.ahead == "both" and not self.wanted:
                return
        else:
            self.values[term.name] = torch.zeros_like(self.statistics.divergence)
        gate = None
        if term.gate is not None and (rules["gate"] in ("student", "both", "lengths") or not first):
            gate = self.layout.pack(term.gate(self.padded() if seen is None else seen)).to(self.work)
        rows, share = None, None
        paired = self.call.batch.paired
        if term.selection is not None or paired is not None:
            rows = _kept_rows(self.layout.pack(tokens), term.kept(self.lengths) if paired is None else sum(paired))
            share = self.layout.pack(Taken(tokens, tokens.to(self.work)).coefficients(term))
        scale = self.scale(term)
        for part in self._chunks(rows):
            if first:
                logits, into = self.sweep(part, both=True, with_gradient=self.wanted)
            else:
                size = part.stop - part.start if isinstance(part, slice) else len(part)
                into = self.statistics.blank(size)
                logits = self._sweep(part, term.divergence, into, both=True, with_gradient=self.wanted)
                self.values[term.name][part] = into.divergence
            if self.wanted:
                weight = scale * (_gate_of(term, into) if gate is None else gate[part])
                self.gradients.add_rows(part, logits, weight if share is None else weight * share[part])

    def sampled_term(self, term: SampledTerm) -> None:
        """A term on the tokens that were sampled; it reads the student alone."""
        ids, function = self.call.batch.token_ids, term.function
        assert ids is not None and function is not None, "evaluate() has refused a batch without ids"
        scale = self.scale(term)
        coefficient = None
        if term.rules:
            seen = self.padded()
            self.taken[term.name] = select(term, seen, self.readable)
            coefficient = self.layout.pack(decide(term, seen, self.taken[term.name]).coefficients(term)).to(self.work)
        values = self.values[term.name] = torch.zeros_like(self.statistics.divergence)
        for rows in self._chunks():
            logits = self._project("student", rows)
            log_p, entropy = self.call.tiles.sampled_gradient(
                logits,
                ids[rows],
                student_transform=self.student.transform,
                temperature=self.objective.temperature,
                work=self.work,
            )
            if self.ahead == "none" and not self.dense:
                self.statistics.student_entropy[rows] = entropy
            with torch.enable_grad():
                leaf = log_p.requires_grad_()
                found = function(leaf, rows)
                (slope,) = torch.autograd.grad(found.sum(), leaf)
            values[rows] = found.detach()
            if self.wanted:
                self.gradients.add_rows(rows, logits, slope * (scale if coefficient is None else scale * coefficient[rows]))

    def finish(self) -> LossTerms:
        """What depends on other tokens, and the result."""
        objective, statistics = self.objective, self.statistics
        scope = teacher_scope(objective)
        everywhere = self.layout.mask if self.readable is None else self.readable
        padded = unread(self.padded(), scored_tokens(scope, everywhere, self.taken, self.dense))
        taken, taus = {}, {}
        for term in objective.active:
            tokens = self.taken[term.name] if term.name in self.taken else select(term, padded, self.readable)
            taken[term.name] = decide(term, padded, tokens)
            if isinstance(term, RankingTerm):
                self.values[term.name], taus[term.name] = self._ranking(term, taken[term.name], scope)
            elif isinstance(term, EntropyTerm):
                self.values[term.name] = statistics.student_entropy
                self._entropy(term, taken[term.name])
        pad = self.layout.pad
        values = {name: pad(per_token) for name, per_token in self.values.items()}
        taus = {name: pad(tau) for name, tau in taus.items()}
        anchor = padded.student_entropy
        terms = assemble(objective, values, taus, padded, taken, self.own, self.divisors, anchor)
        if self.gradients.columns:
            skipped, columns = (torch.tensor(float(n)) for n in (self.gradients.skipped, self.gradients.columns))
            terms.sums["gradient_filter/skipped"] = (skipped, columns)
        return terms

    def _entropy(self, term: EntropyTerm, taken: Taken) -> None:
        """The gradient of an entropy term, on its rows."""
        if not self.wanted:
            return
        scale = self.layout.pack(taken.coefficients(term)) * self.scale(term)
        if term.target == "teacher":
            scale = scale * (self.statistics.student_entropy > self.statistics.teacher_entropy)
        rows = _kept_rows(self.layout.pack(taken.tokens), term.kept(self.lengths))
        for part in rows.split(self.chunk):
            logits = self._project("student", part)
            self.call.tiles.entropy_gradient(
                logits, student_transform=self.student.transform, temperature=self.objective.temperature, work=self.work
            )
            self.gradients.add_rows(part, logits, scale[part])

    def _ranking(self, term: RankingTerm, taken: Taken, scope: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row's Plackett-Luce loss and tau, and the gradient of the rows taken: k columns of each."""
        statistics, k = self.statistics, term.num_candidates
        if self.teacher is None:
            zero = torch.zeros_like(statistics.divergence)
            return zero, zero
        packed = self.layout.pack(taken.tokens)
        if scope != "all":
            self._gather_teacher_scores(_kept_rows(packed, None))
        theirs, ours = statistics.teacher_scores[:, :k], statistics.student_scores[:, :k]
        # k² numbers a token for a while: of some tokens at a time.
        slabs = zip(ours.split(_RANKED), theirs.split(_RANKED), strict=True)
        scores, order, slope, nll, tau = map(torch.cat, zip(*(_ranked(term, *slab) for slab in slabs), strict=True))
        if self.wanted:
            scale = self.layout.pack(taken.coefficients(term)) * self.scale(term)
            # Where a read would wait for the device every row goes, with a scale of 0 off the opener.
            step = max(1, _GATHERED // max(1, k * self.student.hidden.shape[1]))
            for part in _kept_rows(packed, None).split(step):
                ranked = scores[part]
                ids = statistics.candidates[part, :k].gather(1, order[part])
                gradient = slope[part] * self.student.transform.slope(ranked) * scale[part].unsqueeze(-1)
                self.gradients.add_columns(part, ids, gradient)
        return nll, tau.to(self.work)

    def _gather_teacher_scores(self, rows: torch.Tensor) -> None:
        """The teacher's logits of the candidates of some rows: k rows of its head a token, not the whole."""
        assert self.teacher is not None
        ids = self.statistics.candidates
        for part in rows.split(max(1, _GATHERED // max(1, ids.shape[1] * self.teacher.hidden.shape[1]))):
            self.statistics.teacher_scores[part] = self.teacher.scores(part, ids[part], self.work)


def _ranked(term: RankingTerm, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of some rows' candidates, `[rows, k]`: the student's scores in the teacher's order, that order, the gradient by the
    scores; and `[rows]` the loss and tau."""
    order = teacher_order(theirs)
    stages = None if term.stage_weights == "uniform" else teacher_mass(theirs.gather(1, order))
    with torch.enable_grad():
        scores = ours.gather(1, order).requires_grad_()
        nll = plackett_luce_nll(scores, stages)
        (slope,) = torch.autograd.grad(nll.sum(), scores)
    return scores.detach(), order, slope, nll.detach(), kendall_tau(order)


def _gate_of(term: DivergenceTerm, statistics: RowStatistics) -> torch.Tensor:
    """The gate of some rows; such a gate reads its own row only."""
    ones = torch.ones_like(statistics.divergence)
    if term.gate is None:
        return ones
    rows = TokenStatistics(
        mask=ones.bool().unsqueeze(0),
        student_entropy=statistics.student_entropy.unsqueeze(0),
        teacher_entropy=statistics.teacher_entropy.unsqueeze(0),
        divergence=statistics.divergence.unsqueeze(0),
        top1_agreement=statistics.agreement.unsqueeze(0),
    )
    return term.gate(rows)[0].to(ones.dtype)

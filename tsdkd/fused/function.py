"""The autograd function and its one loop over chunks of tokens: each head is projected once.

For a chunk: project both heads, sweep the rows (statistics, and the direct term's gradient in place of the student's
logits), weigh them by the gate, and add the two gradient products. What depends on other tokens comes after the last
chunk and is small: the ranking term touches k columns of the opener's rows, the entropy term ρ of the rows.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tsdkd.fused.reference import Layout, assemble, coefficients, decide, local_counts
from tsdkd.fused.tiles_torch import RowStatistics, Shape
from tsdkd.losses.ranking import kendall_tau, plackett_luce_nll, teacher_order
from tsdkd.losses.reduction import divide
from tsdkd.types import Counts, Head, LossTerms, Objective, TokenBatch, TokenStatistics

logger = logging.getLogger(__name__)
_announced: set[tuple] = set()

# Columns that the gradient filter keeps or skips together.
_FILTER_BLOCK = 512

# Rows of the head that a low-precision weight gradient is rounded through at a time.
_VOCAB_SLICE = 16384


def reads_are_free(device: torch.device) -> bool:
    """Whether looking at a tensor's values costs nothing: on a CPU, where no queue of kernels has to end first."""
    return device.type == "cpu"


def free_bytes(device: torch.device) -> int:
    """Memory that a new buffer may take, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_chunk(chunk_tokens: int | str, tokens: int, vocab: int, item: int, device: torch.device) -> int:
    """Tokens per chunk: as asked, or what a tenth of the free memory holds of both models' logits, within bounds."""
    if chunk_tokens != "auto":
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens!r}: a chunk holds one token or more; pass a whole number or 'auto'.")
        return chunk_tokens
    # Larger chunks read the heads less often; beyond these the gain is below a tenth.
    most = 512 if device.type == "cpu" else 2048
    affordable = free_bytes(device) // 10 // max(1, 2 * vocab * item)
    chunk = int(max(16, min(most, affordable)))
    announcement = (chunk, vocab, device.type)
    if announcement not in _announced:
        _announced.add(announcement)
        size = 2 * chunk * vocab * item / 2**20
        logger.info("chunk_tokens='auto': %d tokens a chunk, %.0f MiB for both models' logits of %d ids.", chunk, size, vocab)
    return chunk


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A sharded (DTensor) weight gathered, once per call; any other as it is. The gradient flows back to the shards."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What the products run in: autocast's dtype where it is on, else the head's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@dataclass
class _Side:
    """One model's hidden states and head, ready for products."""

    hidden: torch.Tensor
    weight: torch.Tensor
    shape: Shape

    def project(self, rows: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Hidden states of some tokens times the head, `[rows, vocab]`, into `out`."""
        hidden = self.hidden[rows]
        return torch.mm(hidden, self.weight.t(), out=out[: hidden.shape[0]])


@dataclass
class Call:
    """One evaluation: what goes in, and what the function leaves behind for `LossTerms`."""

    objective: Objective
    lengths: tuple[int, ...]
    counts: Counts | None
    teacher_hidden: torch.Tensor
    student_head: Head
    teacher_head: Head
    chunk_tokens: int | str
    gradient_filter: float
    tiles: ModuleType
    with_gradient: bool
    terms: LossTerms | None = None

    def sides(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[_Side, _Side, torch.dtype]:
        """Both models' operands, and the dtype of the statistics."""
        made = []
        work = torch.promote_types(torch.float32, hidden.dtype)
        teacher = self.teacher_head
        for states, w, b, head in (
            (hidden, weight, bias, self.student_head),
            (self.teacher_hidden, whole(teacher.weight), None if teacher.bias is None else whole(teacher.bias), teacher),
        ):
            dtype = compute_dtype(states, w)
            cut = w.detach()[: head.size].to(dtype)
            offset = None if b is None else b.detach()[: head.size].to(work)
            made.append(_Side(states.detach().to(dtype), cut, Shape(offset, head.logit_scale, head.softcap)))
        return made[0], made[1], work


class _Gradients:
    """The gradients of hidden states, weight and bias, each only where it is wanted; weight and bias in float32 or better.

    They are held in units of `unit`, so that a token's share of a large step does not underflow in fp16 products.
    """

    def __init__(
        self,
        side: _Side,
        full_vocab: int,
        wanted: tuple[bool, bool, bool],
        work: torch.dtype,
        smallest: float,
        unit: torch.Tensor,
    ) -> None:
        tokens, size = side.hidden.shape
        self.side = side
        self.smallest = smallest
        self.unit = unit
        self.skipped = self.columns = 0
        vocab = side.weight.shape[0]
        self.hidden = torch.zeros(tokens, size, dtype=work, device=side.hidden.device) if wanted[0] else None
        self.weight = torch.zeros(full_vocab, size, dtype=work, device=side.hidden.device) if wanted[1] else None
        self.bias = torch.zeros(full_vocab, dtype=work, device=side.hidden.device) if wanted[2] else None
        self._cut = None if self.weight is None else self.weight[:vocab]

    def add_rows(self, rows: slice | torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        """`gradient` `[rows, vocab]` with respect to the products of `rows`, each row to be multiplied by `scale`."""
        scale = (scale / self.unit).unsqueeze(-1)
        weighted = (self.side.hidden[rows] * scale).to(gradient.dtype)
        for columns in self._columns(gradient):
            part = gradient[:, columns]
            if self.hidden is not None:
                add = (part @ self.side.weight[columns]).to(self.hidden.dtype) * scale
                if isinstance(rows, slice):
                    self.hidden[rows] += add
                else:
                    self.hidden.index_add_(0, rows, add)
            if self._cut is not None and self._cut.dtype == gradient.dtype:
                self._cut[columns].addmm_(part.t(), weighted)
            elif self._cut is not None:
                for start in range(columns.start, columns.stop, _VOCAB_SLICE):
                    piece = slice(start, min(start + _VOCAB_SLICE, columns.stop))
                    self._cut[piece] += gradient[:, piece].t() @ weighted
        if self.bias is not None:
            self.bias[: gradient.shape[1]] += scale.to(gradient.dtype).t().mm(gradient)[0]

    def _columns(self, gradient: torch.Tensor) -> list[slice]:
        """The columns that the products take: all, or the runs of blocks where some token's gradient reaches `smallest`."""
        vocab = gradient.shape[1]
        if not self.smallest:
            return [slice(0, vocab)]
        largest = torch.maximum(gradient.amax(0), gradient.amin(0).neg_())
        blocks = torch.nn.functional.pad(largest, (0, -vocab % _FILTER_BLOCK)).unflatten(0, (-1, _FILTER_BLOCK)).amax(-1)
        kept: list[slice] = []
        for block, keep in enumerate((blocks >= self.smallest).tolist()):
            start, stop = block * _FILTER_BLOCK, min((block + 1) * _FILTER_BLOCK, vocab)
            if keep and kept and kept[-1].stop == start:
                kept[-1] = slice(kept[-1].start, stop)
            elif keep:
                kept.append(slice(start, stop))
        self.columns += vocab
        self.skipped += vocab - sum(run.stop - run.start for run in kept)
        return kept

    def add_columns(self, rows: torch.Tensor, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """`gradient` `[rows, k]` with respect to the products of the ids `[rows, k]` of some tokens."""
        gradient = gradient / self.unit
        if self.hidden is not None:
            heads = self.side.weight[ids].to(gradient.dtype)  # [rows, k, hidden]
            self.hidden.index_add_(0, rows, torch.einsum("nk,nkh->nh", gradient, heads))
        if self.weight is not None:
            parts = gradient.unsqueeze(-1) * self.side.hidden[rows].to(gradient.dtype).unsqueeze(1)
            # ids repeat: index_add_ adds them in any order on a GPU, index_put_ sorts them first
            self.weight.index_put_((ids.flatten(),), parts.flatten(0, 1), accumulate=True)
        if self.bias is not None:
            self.bias.index_put_((ids.flatten(),), gradient.flatten(), accumulate=True)


def _kept_rows(mask: torch.Tensor, count: int | None) -> torch.Tensor:
    """Where a packed mask is True; `count`, if the lengths alone give it, spares a read from the device."""
    if count is not None and not reads_are_free(mask.device):
        return torch.nonzero_static(mask, size=count)[:, 0]
    return mask.nonzero()[:, 0]


def _padded(statistics: RowStatistics, layout: Layout) -> TokenStatistics:
    """The rows' statistics laid out by response."""
    return TokenStatistics(
        mask=layout.mask,
        student_entropy=layout.pad(statistics.student_entropy),
        teacher_entropy=layout.pad(statistics.teacher_entropy),
        divergence=layout.pad(statistics.divergence),
        top1_agreement=layout.pad(statistics.agreement),
    )


def _announce_price(gate: Any, needs: str) -> None:
    """Say once what a gate costs that reads other tokens."""
    announcement = (id(gate), needs)
    if announcement not in _announced:
        _announced.add(announcement)
        what = "the student's head once more" if needs == "student" else "both heads once more"
        logger.info("the gate reads other tokens (needs=%r): every step projects %s, ahead of the loss.", needs, what)


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
        objective = call.objective
        wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        if not call.with_gradient:
            wanted = (False, False, False)
        student, teacher, work = call.sides(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            tokens, vocab = hidden.shape[0], student.weight.shape[0]
            k = min(objective.num_candidates if objective.opener is not None else 1, vocab)
            statistics = RowStatistics.empty(tokens, k, student.hidden.new_zeros((), dtype=work))
            device = hidden.device
            layout = Layout(call.lengths, device)
            static = _static_count(objective, call.lengths)
            own = Counts(sum(call.lengths), static or 0, sum(length > 0 for length in call.lengths))
            divisors = own if call.counts is None else call.counts
            unit = divide(statistics.divergence.new_ones(()), divisors.tokens)
            gradients = _Gradients(student, weight.shape[0], wanted, work, call.gradient_filter, unit)

            # Direct term, and everybody's statistics.
            needs_gradient = any(wanted) and objective.direct_weight != 0
            chunk = min(choose_chunk(call.chunk_tokens, tokens, vocab, student.hidden.element_size(), device), max(1, tokens))
            buffers = [torch.empty(chunk, vocab, dtype=side.weight.dtype, device=device) for side in (student, teacher)]

            def sweep(rows: slice, teacher: _Side, with_gradient: bool) -> tuple[torch.Tensor, RowStatistics]:
                into = statistics.rows(rows.start, rows.stop)
                logits = student.project(rows, buffers[0])
                call.tiles.sweep(
                    logits,
                    teacher.project(rows, buffers[1])
                    if teacher is not student
                    else buffers[1][: logits.shape[0]].copy_(logits),
                    student_shape=student.shape,
                    teacher_shape=teacher.shape,
                    divergence=objective.divergence,
                    parameter=objective.divergence_parameter,
                    temperature=objective.temperature,
                    statistics=into,
                    with_gradient=with_gradient,
                )
                return logits, into

            chunks = [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
            ahead = None
            needs = getattr(objective.gate, "needs", "token")
            if needs_gradient and needs != "token":
                _announce_price(objective.gate, needs)
                for rows in chunks:
                    sweep(rows, teacher if needs == "both" else student, with_gradient=False)
                seen = _padded(statistics, layout)
                if needs == "student":
                    seen = TokenStatistics(mask=seen.mask, student_entropy=seen.student_entropy)
                assert objective.gate is not None
                ahead = layout.pack(objective.gate(seen)).to(work)
            for rows in chunks:
                logits, into = sweep(rows, teacher, needs_gradient)
                if needs_gradient:
                    gate = _gate_of(objective, into) if ahead is None else ahead[rows]
                    gradients.add_rows(rows, logits, gate * objective.direct_weight * unit)

            # What depends on other tokens.
            padded = _padded(statistics, layout)
            weights = decide(objective, padded)
            if static is None:  # a rule of the user's own: only its mask tells
                own = local_counts(weights, layout.mask)
                divisors = own if call.counts is None else call.counts
            order = teacher_order(statistics.teacher_scores)
            nll, score_gradient = _ranking(statistics, order)
            scales = coefficients(objective, weights, layout.mask)
            assert padded.divergence is not None
            tau = torch.where(weights.opener, layout.pad(kendall_tau(order).to(work)), 0.0)
            per_token = layout.pad(nll), padded.divergence, padded.student_entropy
            call.terms = assemble(objective, per_token, padded, weights, tau, own, divisors)
            if any(wanted) and objective.opener is not None:
                scale = layout.pack(scales[0]) * divide(unit.new_full((), objective.indirect_weight), divisors.responses)
                _add_ranking(gradients, statistics, order, score_gradient, scale, layout.pack(weights.opener), student.shape)
            if any(wanted) and objective.top_entropy is not None:
                scale = layout.pack(scales[2]) * divide(unit.new_full((), objective.entropy_weight), divisors.selected)
                selected = _kept_rows(layout.pack(weights.top_entropy), static)
                for part in selected.split(chunk):
                    logits = student.project(part, buffers[0])
                    call.tiles.entropy_gradient(
                        logits, student_shape=student.shape, temperature=objective.temperature, work=work
                    )
                    gradients.add_rows(part, logits, scale[part])

        if gradients.columns:
            skipped = (torch.tensor(float(count)) for count in (gradients.skipped, gradients.columns))
            call.terms.sums["gradient_filter/skipped"] = (next(skipped), next(skipped))
        ctx.gradients = gradients if any(wanted) else None
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


def _static_count(objective: Objective, lengths: tuple[int, ...]) -> int | None:
    """How many tokens the entropy term selects, where its rule tells from lengths alone."""
    if objective.top_entropy is None:
        return 0
    count = getattr(objective.top_entropy, "count", None)
    return None if count is None else sum(count(length) for length in lengths)


def _ranking(statistics: RowStatistics, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's Plackett-Luce loss, and its gradient with respect to the scores in the teacher's order."""
    if statistics.candidates.shape[1] < 2:
        return torch.zeros_like(statistics.divergence), torch.zeros_like(statistics.student_scores)
    with torch.enable_grad():
        scores = statistics.student_scores.gather(1, order).requires_grad_()
        nll = plackett_luce_nll(scores)
        (gradient,) = torch.autograd.grad(nll.sum(), scores)
    return nll.detach(), gradient


def _add_ranking(gradients: _Gradients, statistics, order, score_gradient, scale, opener, shape: Shape) -> None:
    """The ranking term's gradient, k columns of the opener's rows."""
    # Where a read would wait for the device every row goes, with a scale of 0 off the opener.
    rows = opener.nonzero()[:, 0] if reads_are_free(opener.device) else torch.arange(opener.shape[0], device=opener.device)
    step = max(1, (1 << 22) // max(1, order.shape[1] * gradients.side.hidden.shape[1]))
    for part in rows.split(step):
        ranked = statistics.student_scores[part].gather(1, order[part])
        ids = statistics.candidates[part].gather(1, order[part])
        gradients.add_columns(part, ids, score_gradient[part] * shape.slope(ranked) * scale[part].unsqueeze(-1))


def evaluate(
    objective: Objective,
    batch: TokenBatch,
    student_head: Head,
    teacher_head: Head,
    counts: Counts | None,
    tiles: ModuleType,
    chunk_tokens: int | str,
    gradient_filter: float,
) -> LossTerms:
    """An objective from hidden states and heads that are cut to the shared vocabulary."""
    call = Call(
        objective=objective,
        lengths=tuple(batch.lengths),
        counts=counts,
        teacher_hidden=batch.teacher_hidden,
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

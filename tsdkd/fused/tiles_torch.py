"""Chunk arithmetic in torch: row statistics, and gradients that overwrite the logits they came from.

Each function takes logits `[rows, vocab]` of one chunk of tokens and works in blocks of rows whose temporaries stay in
the processor's cache; on a GPU one block is the whole chunk. `tiles_triton.py` has the same functions with the same
arguments as kernels.

The gradient of any dense term with respect to a row of student logits needs only that row once its sums are complete, so
one sweep computes statistics and gradient; a row's weight (gate, count) is applied later to the small factors of the two
gradient products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from tsdkd.losses import DIVERGENCES
from tsdkd.types import Divergence

# Elements of one temporary of a block: five of them fit into a few MiB of cache.
_BLOCK_ELEMENTS = 1 << 18
_TOPK_TILE = 128

# A log-probability that stands for −∞, and what no finite divergence reaches.
_IMPOSSIBLE, _INFINITE = -3e38, 1e6


@dataclass
class RowStatistics:
    """What the sweep leaves of each row, `[rows]` and `[rows, k]`.

    Attributes:
        student_entropy, teacher_entropy, divergence: nats.
        agreement: 1 where the teacher's highest logit is that of the student's favourite.
        candidates: ids of the student's k highest logits, best first, the lower id first among equals.
        student_scores, teacher_scores: both models' untempered logits there.
    """

    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    divergence: torch.Tensor
    agreement: torch.Tensor
    candidates: torch.Tensor
    student_scores: torch.Tensor
    teacher_scores: torch.Tensor

    @classmethod
    def empty(cls, rows: int, k: int, like: torch.Tensor) -> RowStatistics:
        column, table = like.new_zeros(rows), like.new_zeros(rows, k)
        ids = torch.zeros(rows, k, dtype=torch.long, device=like.device)
        return cls(column, column.clone(), column.clone(), column.clone(), ids, table, table.clone())

    def blank(self, rows: int) -> RowStatistics:
        """Room for as many rows, of the same kind."""
        return RowStatistics.empty(rows, self.candidates.shape[1], self.divergence)

    def put(self, index: torch.Tensor, other: RowStatistics) -> None:
        """Write the statistics of some rows, `index` `[rows]`."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[index] = getattr(other, name)

    def rows(self, start: int, stop: int) -> RowStatistics:
        """Views of some rows."""
        return RowStatistics(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class LogitTransform:
    """How raw products become logits: `cap · tanh(scale · (product + bias) / cap)`."""

    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, products: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.bias is not None:
            products.add_(self.bias)
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def at(self, products: torch.Tensor, ids: torch.Tensor, work: torch.dtype) -> torch.Tensor:
        """The logits of some ids `[rows, n]` of `products` `[rows, vocab]`."""
        bias = None if self.bias is None else self.bias.to(work)[ids]
        return LogitTransform(bias, self.scale, self.softcap).apply_(products.gather(1, ids).to(work))

    def slope(self, logits: torch.Tensor) -> torch.Tensor:
        """d logits / d products, from the logits; a new tensor."""
        slope = torch.full_like(logits, self.scale)
        if self.softcap is not None:
            slope.addcmul_(logits, logits, value=-self.scale / self.softcap**2)
        return slope


def block_rows(vocab: int, device: torch.device, rows: int) -> int:
    """How many rows are worked on at a time."""
    return max(1, _BLOCK_ELEMENTS // max(1, vocab)) if device.type == "cpu" else max(1, rows)


def _dot(a: torch.Tensor, b: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Σ_v a·b of each row, `[rows, 1]`; `spare` is overwritten."""
    if a.shape[0] == 1 and a.device.type == "cpu":
        return torch.dot(a[0], b[0]).reshape(1, 1)
    return torch.mul(a, b, out=spare).sum(-1, keepdim=True)


def tile_maxima(logits: torch.Tensor) -> torch.Tensor:
    """The highest logit of every tile of `_TOPK_TILE` ids, `[rows, tiles]`."""
    vocab = logits.shape[1]
    whole = vocab // _TOPK_TILE
    highest = logits[:, : whole * _TOPK_TILE].unflatten(1, (whole, _TOPK_TILE)).amax(-1)
    if vocab % _TOPK_TILE:
        highest = torch.cat([highest, logits[:, whole * _TOPK_TILE :].amax(-1, keepdim=True)], 1)
    return highest


def top_candidates(
    products: torch.Tensor, k: int, highest: torch.Tensor, transform: LogitTransform | None = None
) -> torch.Tensor:
    """Ids of the k highest logits of each row, best first; of equal logits the lower id is the earlier.

    Exact without sorting the vocabulary: the k best tiles by (highest logit, position) hold the k best tokens, since each
    tile before another holds a token that comes before all of the other's.

    Args:
        products: `[rows, vocab]`; logits where `transform` is None.
        highest: `tile_maxima` of the logits.
        transform: from products to logits.
    """
    vocab = products.shape[1]
    best = highest.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    ids = (best.unsqueeze(-1) * _TOPK_TILE + torch.arange(_TOPK_TILE, device=products.device)).flatten(1)
    inside = ids.clamp(max=vocab - 1)
    values = products.gather(1, inside) if transform is None else transform.at(products, inside, highest.dtype)
    values = values.masked_fill(ids >= vocab, -math.inf)
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.gather(1, order)


# The divergences that have a tile of their own here and in `tiles_triton.py`; autograd differentiates every other.
_WRITTEN: dict[Any, str] = {
    function: name
    for name, function in DIVERGENCES.items()
    if name in ("forward_kl", "generalized_jsd", "reverse_kl", "skew_forward_kl", "skew_reverse_kl")
}


def written_tile(divergence: Divergence) -> tuple[str, float] | None:
    """The name and the parameter of the hand-written tile that computes a divergence, or None."""
    name = _WRITTEN.get(divergence.function) if isinstance(divergence.function, FunctionType) else None
    if name is None:
        return None
    if divergence.parameter is None:
        return (name, 0.0) if name in ("forward_kl", "reverse_kl") else None
    return canonical(name, divergence.parameter)


def canonical(name: str, parameter: float) -> tuple[str, float]:
    """The tile of a divergence; its ends go by the names of the KLs that they are."""
    if name == "generalized_jsd" and parameter in (0.0, 1.0):
        return ("forward_kl" if parameter == 0.0 else "reverse_kl"), 0.0
    return (name.removeprefix("skew_") if parameter == 0.0 else name), parameter


def _normalise_(logits: torch.Tensor, highest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Logits to log-probabilities in place, probabilities into `out`; the log-normaliser `[rows, 1]`.

    The log-probability of an impossible id is `_IMPOSSIBLE`, not −∞: times its probability it is 0.
    """
    logits.sub_(highest)
    torch.exp(logits, out=out)
    total = out.sum(-1, keepdim=True)
    log_total = total.log()
    logits.sub_(log_total).clamp_min_(_IMPOSSIBLE)
    out.mul_(total.reciprocal_())
    return highest + log_total


def _log_mixture(p: torch.Tensor, weight: float, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """log(weight · p + (1 − weight) · q) into `out`; where both underflow, so does their part of every sum."""
    torch.mul(q, 1.0 - weight, out=out)
    out.add_(p, alpha=weight)
    return out.clamp_min_(torch.finfo(out.dtype).tiny).log_()


def _divergence(kind: str, parameter: float, log_s, p_s, log_t, p_t, spare, gradient) -> torch.Tensor:
    """One divergence of a block, `[rows, 1]`; the gradient with respect to the student's tempered logits into `gradient`.

    `log_t` and `p_t` are overwritten, `log_s` and `p_s` are kept.
    """
    if kind == "forward_kl":  # gradient p_S − p_T
        value = _dot(p_t, log_t.sub_(log_s), spare)
        torch.sub(p_s, p_t, out=gradient)
        return value
    if kind == "reverse_kl":  # gradient p_S (log p_S − log p_T − KL)
        torch.sub(log_s, log_t, out=gradient)
        value = _dot(p_s, gradient, spare)
        gradient.sub_(value).mul_(p_s)
        return value
    if kind == "generalized_jsd":  # gradient (1 − β) p_S (log p_S − log m − KL(p_S ‖ m))
        log_m = _log_mixture(p_t, parameter, p_s, gradient)
        to_teacher = _dot(p_t, log_t.sub_(log_m), spare)
        torch.sub(log_s, log_m, out=gradient)
        to_student = _dot(p_s, gradient, spare)
        gradient.sub_(to_student).mul_(p_s).mul_(1.0 - parameter)
        return parameter * to_teacher + (1.0 - parameter) * to_student
    if kind == "skew_forward_kl":  # gradient −(1 − α) p_S (p_T/m − Σ p_S p_T/m)
        log_m = _log_mixture(p_t, parameter, p_s, gradient)
        torch.sub(log_t, log_m, out=spare)
        ratio = torch.exp(spare, out=gradient)  # p_T / m; spare holds log p_T − log m
        value = _dot(p_t, spare, log_t)
        mean = _dot(p_s, ratio, spare)
        gradient.sub_(mean).mul_(p_s).mul_(parameter - 1.0)
        return value
    if kind == "skew_reverse_kl":  # gradient p_S (log p_S − log m − KL − α (p_S/m − Σ p_S²/m))
        log_m = _log_mixture(p_s, parameter, p_t, gradient)
        torch.sub(log_s, log_m, out=gradient)
        value = _dot(p_s, gradient, spare)
        ratio = torch.exp(gradient, out=p_t)  # p_S / m
        mean = _dot(p_s, ratio, spare)
        gradient.sub_(value).sub_(ratio, alpha=parameter).add_(mean, alpha=parameter).mul_(p_s)
        return value
    raise AssertionError(f"unknown divergence {kind!r}")


def _by_autograd(
    divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """Any divergence of a block of tempered logits, `[rows]`; its gradient into `gradient` where one is wanted."""
    if gradient is None:
        with torch.no_grad():
            return divergence(student, teacher)
    with torch.enable_grad():
        leaf = student.requires_grad_()
        value = divergence(leaf, teacher)
        (found,) = torch.autograd.grad(value.sum(), leaf)
    gradient.copy_(found)
    return value.detach()


def sweep(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    *,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    divergence: Divergence,
    temperature: float,
    statistics: RowStatistics,
    with_gradient: bool,
) -> None:
    """Statistics of every row, and the divergence's gradient in place of the student's products.

    Args:
        student, teacher: `[rows, vocab]`, hidden states times head weights, over one vocabulary unless the divergence is one
            of `own_vocabularies` (then no scores of candidates and no agreement are written); the student's are overwritten by
            ∂divergence/∂product (without the row's weight), the teacher's are spoilt. Without a teacher the student's
            statistics alone are written, and there is no gradient.
        student_transform, teacher_transform: from products to logits.
        divergence: by a tile of its own, or differentiated by autograd, block by block.
        temperature: τ.
        statistics: where the rows' statistics go, in float32 or float64.
        with_gradient: False leaves the student's products spoilt and skips the gradient's arithmetic.
    """
    rows, vocab = student.shape
    size = block_rows(vocab, student.device, rows)
    work = statistics.divergence.dtype
    spares = [torch.empty(min(size, rows), vocab, dtype=work, device=student.device) for _ in range(4)]
    k = statistics.candidates.shape[1]
    tile = written_tile(divergence)
    if teacher is not None and divergence.own_vocabularies:
        spares[1] = torch.empty(min(size, rows), teacher.shape[1], dtype=work, device=student.device)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        p_s, p_t, gradient, spare = (buffer[: stop - start] for buffer in spares)
        into = statistics.rows(start, stop)
        s = student_transform.apply_(student[start:stop].to(work))
        tiles = tile_maxima(s)
        ids, s_highest = top_candidates(s, k, tiles), tiles.amax(-1, keepdim=True)
        into.candidates.copy_(ids)
        torch.gather(s, 1, ids, out=into.student_scores)
        if temperature != 1.0:
            s.mul_(1.0 / temperature)
            s_highest.mul_(1.0 / temperature)
        s_logits = s.clone() if tile is None and teacher is not None else s  # the next line overwrites it
        s_log_total = _normalise_(s, s_highest, p_s)
        into.student_entropy.copy_(_dot(p_s, s, spare)[:, 0]).neg_()
        if teacher is None:
            continue
        t = teacher_transform.apply_(teacher[start:stop].to(work))
        t_highest = t.amax(-1, keepdim=True)
        if not divergence.own_vocabularies:
            torch.gather(t, 1, ids, out=into.teacher_scores)
            into.agreement.copy_(into.teacher_scores[:, 0] == t_highest[:, 0])
        if temperature != 1.0:
            t.mul_(1.0 / temperature)
            t_highest.mul_(1.0 / temperature)
        t_logits = t.clone() if tile is None else t
        _normalise_(t, t_highest, p_t)
        into.teacher_entropy.copy_(_dot(p_t, t, spare if t.shape == spare.shape else torch.empty_like(t))[:, 0]).neg_()
        if tile is None:
            into.divergence.copy_(_by_autograd(divergence, s_logits, t_logits, gradient if with_gradient else None))
        else:
            value = _divergence(*tile, s, p_s, t, p_t, spare, gradient)[:, 0]
            into.divergence.copy_(value.masked_fill_(value > _INFINITE, math.inf))
        if with_gradient:
            _through_transform_(gradient, s, s_log_total, student_transform, temperature)
            student[start:stop].copy_(gradient)


def _through_transform_(gradient, log_p, log_total, transform: LogitTransform, temperature: float) -> None:
    """From ∂/∂(tempered logit) to ∂/∂product, in place; `log_p` is spoilt where there is a soft cap."""
    factor = transform.scale / temperature
    if transform.softcap is not None:
        logits = log_p.add_(log_total).mul_(temperature / transform.softcap)
        gradient.addcmul_(gradient, logits.square_(), value=-1.0)
    if factor != 1.0:
        gradient.mul_(factor)


def entropy_gradient(
    student: torch.Tensor, *, student_transform: LogitTransform, temperature: float, work: torch.dtype
) -> None:
    """Overwrite the student's products `[rows, vocab]` by ∂entropy/∂product = −p_S (log p_S + H_S) through the transform."""
    for rows, s, log_total, p, gradient in _normalised_blocks(student, student_transform, temperature, work):
        minus_entropy = _dot(p, s, gradient)
        torch.sub(minus_entropy, s, out=gradient)
        gradient.mul_(p)
        _through_transform_(gradient, s, log_total, student_transform, temperature)
        student[rows].copy_(gradient)


def sampled_gradient(
    student: torch.Tensor, ids: torch.Tensor, *, student_transform: LogitTransform, temperature: float, work: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite the student's products `[rows, vocab]` by ∂log p_S(id)/∂product, for one id a row.

    Args:
        ids: `[rows]`.

    Returns:
        log p_S(id) and the entropy of each row, `[rows]`.
    """
    log_p = torch.empty(len(ids), dtype=work, device=student.device)
    entropy = torch.empty_like(log_p)
    for rows, s, log_total, p, gradient in _normalised_blocks(student, student_transform, temperature, work):
        column = ids[rows].unsqueeze(-1)
        chosen = s.gather(1, column)[:, 0]
        log_p[rows] = chosen.masked_fill(chosen == _IMPOSSIBLE, -math.inf)
        entropy[rows] = -_dot(p, s, gradient)[:, 0]
        torch.neg(p, out=gradient)
        gradient.scatter_add_(1, column, torch.ones_like(column, dtype=work))
        _through_transform_(gradient, s, log_total, student_transform, temperature)
        student[rows].copy_(gradient)
    return log_p, entropy


def _normalised_blocks(
    student: torch.Tensor, transform: LogitTransform, temperature: float, work: torch.dtype
) -> Iterator[tuple]:
    """Blocks of rows: where, log-probabilities, log-normaliser `[rows, 1]`, probabilities, and a spare buffer."""
    rows, vocab = student.shape
    size = block_rows(vocab, student.device, rows)
    spares = [torch.empty(min(size, rows), vocab, dtype=work, device=student.device) for _ in range(2)]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        p, spare = (buffer[: stop - start] for buffer in spares)
        s = transform.apply_(student[start:stop].to(work))
        if temperature != 1.0:
            s.mul_(1.0 / temperature)
        log_total = _normalise_(s, s.amax(-1, keepdim=True), p)
        yield slice(start, stop), s, log_total, p, spare

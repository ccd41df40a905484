"""The functions of `tiles_torch.py` as Triton kernels: one row of the chunk per program.

A row is read three times and written once: its maxima and normalisers (with the highest logit of every tile, from which
the candidates are found exactly), its sums, and its gradient in place of the student's products. Statistics are in
float32 (float64 for float64 products); a program's order of summation is fixed, so results are deterministic.

Factors of a head, τ and the divergence's parameter are compile-time constants: Triton takes a Python float that is passed at
run time as float32, whatever it is combined with.

`TRITON_INTERPRET=1` runs the kernels on a CPU, for correctness. They have not been measured on a GPU.
"""

from __future__ import annotations

import logging
import os

import torch
import triton
import triton.language as tl

from tsdkd.fused import tiles_torch
from tsdkd.fused.tiles_torch import _TOPK_TILE, LogitTransform, RowStatistics, top_candidates, written_tile
from tsdkd.types import Divergence

logger = logging.getLogger(__name__)
_announced: set[str] = set()

# Ids a block and warps that autotune chooses from. Compiled for A100, H100 and B200 none of these spills a register, whatever
# the divergence; 2048 ids on four warps or eight, 4096 on eight and 8192 on any do for some (tests/kernels/test_compile.py).
CONFIGS = ((1024, 4), (1024, 8), (1024, 16), (2048, 16), (4096, 16))

KINDS = {"forward_kl": 0, "reverse_kl": 1, "generalized_jsd": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _tuned(kernel, overwritten):
    """The kernel with the best block and warps for its vocabulary; in the interpreter, which cannot time, a fixed block."""
    if _INTERPRETED:
        return kernel
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in CONFIGS]
    return triton.autotune(configs, key=["vocab"], restore_value=overwritten)(kernel)


def _block() -> dict[str, int]:
    return {"BLOCK": 512} if _INTERPRETED else {}


@triton.jit
def _load_logits(
    row_ptr,
    bias_ptr,
    columns,
    vocab,
    scale: tl.constexpr,
    cap: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WORK: tl.constexpr,
):
    inside = columns < vocab
    z = tl.load(row_ptr + columns, mask=inside, other=0.0).to(WORK)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(WORK)
    z = z * scale
    if HAS_CAP:
        u = tl.exp(-2.0 * tl.abs(z / cap))  # tanh without overflow
        size = cap * (1.0 - u) / (1.0 + u)
        z = tl.where(z < 0, -size, size)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _normalisers(
    s_ptr, t_ptr, s_bias, t_bias, tiles_ptr, s_max_ptr, t_max_ptr, s_log_ptr, t_log_ptr,
    vocab: tl.constexpr, stride, tile_stride, s_scale: tl.constexpr, s_cap: tl.constexpr,
    t_scale: tl.constexpr, t_cap: tl.constexpr, inverse_tau: tl.constexpr,
    S_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_BIAS: tl.constexpr, T_CAP: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_max = tl.full((), float("-inf"), WORK)
    t_max = tl.full((), float("-inf"), WORK)
    s_sum = tl.zeros((), WORK)
    t_sum = tl.zeros((), WORK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
        t = _load_logits(t_ptr + row * stride, t_bias, columns, vocab, t_scale, t_cap, T_BIAS, T_CAP, WORK)
        tile = start // TILE + tl.arange(0, BLOCK // TILE)
        highest = tl.max(tl.reshape(s, (BLOCK // TILE, TILE)), axis=1)
        tl.store(tiles_ptr + row * tile_stride + tile, highest, mask=tile < tile_stride)
        s_new = tl.maximum(s_max, tl.max(s, axis=0))
        t_new = tl.maximum(t_max, tl.max(t, axis=0))
        s_sum = s_sum * tl.exp((s_max - s_new) * inverse_tau) + tl.sum(tl.exp((s - s_new) * inverse_tau), axis=0)
        t_sum = t_sum * tl.exp((t_max - t_new) * inverse_tau) + tl.sum(tl.exp((t - t_new) * inverse_tau), axis=0)
        s_max = s_new
        t_max = t_new
    tl.store(s_max_ptr + row, s_max)
    tl.store(t_max_ptr + row, t_max)
    # Apart from the maxima: their sum would round a row's log-probabilities all the same way.
    tl.store(s_log_ptr + row, tl.log(s_sum))
    tl.store(t_log_ptr + row, tl.log(t_sum))


@triton.jit
def _pair(s, t, parameter: tl.constexpr, KIND: tl.constexpr, TINY: tl.constexpr):
    """log-probabilities of a block to: both probabilities, what a sum weighs by p_T, by p_S, and the second by p_S."""
    p_s = tl.exp(s)
    p_t = tl.exp(t)
    by_t = tl.zeros_like(s)
    by_s = tl.zeros_like(s)
    ratio = tl.zeros_like(s)
    if KIND == 0:
        by_t = t - s
    elif KIND == 1:
        by_s = s - t
    elif KIND == 2:
        m = tl.maximum(parameter * p_t + (1.0 - parameter) * p_s, TINY)
        by_t = t - tl.log(m)
        by_s = s - tl.log(m)
    elif KIND == 3:
        m = tl.maximum(parameter * p_t + (1.0 - parameter) * p_s, TINY)
        by_t = t - tl.log(m)
        ratio = p_t / m
    else:
        m = tl.maximum(parameter * p_s + (1.0 - parameter) * p_t, TINY)
        by_s = s - tl.log(m)
        ratio = p_s / m
    # An id without probability, or beyond the vocabulary, adds nothing: 0 · ∞ = 0.
    return p_s, p_t, tl.where(p_t > 0, by_t, 0.0), tl.where(p_s > 0, by_s, 0.0), ratio


@triton.jit
def _sums_and_gradient(
    s_ptr, t_ptr, s_bias, t_bias, s_max_ptr, t_max_ptr, s_log_ptr, t_log_ptr, s_entropy_ptr, t_entropy_ptr, value_ptr,
    vocab: tl.constexpr, stride, s_scale: tl.constexpr, s_cap: tl.constexpr, t_scale: tl.constexpr, t_cap: tl.constexpr,
    inverse_tau: tl.constexpr, parameter: tl.constexpr,
    S_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_BIAS: tl.constexpr, T_CAP: tl.constexpr,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, WORK: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_max = tl.load(s_max_ptr + row)
    t_max = tl.load(t_max_ptr + row)
    s_log = tl.load(s_log_ptr + row)
    t_log = tl.load(t_log_ptr + row)
    s_entropy = tl.zeros((), WORK)
    t_entropy = tl.zeros((), WORK)
    sum_t = tl.zeros((), WORK)
    sum_s = tl.zeros((), WORK)
    sum_ratio = tl.zeros((), WORK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
        t = _load_logits(t_ptr + row * stride, t_bias, columns, vocab, t_scale, t_cap, T_BIAS, T_CAP, WORK)
        s = (s - s_max) * inverse_tau - s_log
        t = (t - t_max) * inverse_tau - t_log
        p_s, p_t, by_t, by_s, ratio = _pair(s, t, parameter, KIND, TINY)
        s_entropy -= tl.sum(tl.where(p_s > 0, p_s * s, 0.0), axis=0)
        t_entropy -= tl.sum(tl.where(p_t > 0, p_t * t, 0.0), axis=0)
        sum_t += tl.sum(p_t * by_t, axis=0)
        sum_s += tl.sum(p_s * by_s, axis=0)
        sum_ratio += tl.sum(p_s * ratio, axis=0)
    value = sum_t + sum_s
    if KIND == 2:
        value = parameter * sum_t + (1.0 - parameter) * sum_s
    tl.store(s_entropy_ptr + row, s_entropy)
    tl.store(t_entropy_ptr + row, t_entropy)
    tl.store(value_ptr + row, value)
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
            t = _load_logits(t_ptr + row * stride, t_bias, columns, vocab, t_scale, t_cap, T_BIAS, T_CAP, WORK)
            p_s, p_t, by_t, by_s, ratio = _pair(
                (z - s_max) * inverse_tau - s_log, (t - t_max) * inverse_tau - t_log, parameter, KIND, TINY
            )
            if KIND == 0:
                gradient = p_s - p_t
            elif KIND == 1:
                gradient = p_s * (by_s - sum_s)
            elif KIND == 2:
                gradient = (1.0 - parameter) * p_s * (by_s - sum_s)
            elif KIND == 3:
                gradient = (parameter - 1.0) * p_s * (ratio - sum_ratio)
            else:
                gradient = p_s * (by_s - sum_s - parameter * (ratio - sum_ratio))
            gradient = gradient * (s_scale * inverse_tau)
            if S_CAP:
                gradient = gradient * (1.0 - (z / s_cap) * (z / s_cap))
            inside = columns < vocab
            tl.store(s_ptr + row * stride + columns, tl.where(inside, gradient, 0.0).to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _student_rows(
    s_ptr, s_bias, ids_ptr, log_p_ptr, entropy_ptr, vocab: tl.constexpr, stride,
    s_scale: tl.constexpr, s_cap: tl.constexpr, inverse_tau: tl.constexpr,
    S_BIAS: tl.constexpr, S_CAP: tl.constexpr, SAMPLED: tl.constexpr, BLOCK: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    # The gradient of the entropy or, where SAMPLED, of the log-probability of one id a row.
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), WORK)
    total = tl.zeros((), WORK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
        new = tl.maximum(highest, tl.max(s, axis=0))
        total = total * tl.exp((highest - new) * inverse_tau) + tl.sum(tl.exp((s - new) * inverse_tau), axis=0)
        highest = new
    log_total = tl.log(total)
    entropy = tl.zeros((), WORK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
        s = (s - highest) * inverse_tau - log_total
        p = tl.exp(s)
        entropy -= tl.sum(tl.where(p > 0, p * s, 0.0), axis=0)
    if SAMPLED:
        id = tl.load(ids_ptr + row)
        log_p = tl.zeros((), WORK)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load_logits(s_ptr + row * stride, s_bias, columns, vocab, s_scale, s_cap, S_BIAS, S_CAP, WORK)
        s = (z - highest) * inverse_tau - log_total
        if SAMPLED:
            here = columns == id
            log_p += tl.sum(tl.where(here, s, 0.0), axis=0)
            gradient = (here.to(WORK) - tl.exp(s)) * (s_scale * inverse_tau)
        else:
            p = tl.exp(s)
            gradient = tl.where(p > 0, -p * (s + entropy), 0.0) * (s_scale * inverse_tau)
        if S_CAP:
            gradient = gradient * (1.0 - (z / s_cap) * (z / s_cap))
        inside = columns < vocab
        tl.store(s_ptr + row * stride + columns, tl.where(inside, gradient, 0.0).to(s_ptr.dtype.element_ty), mask=inside)
    if SAMPLED:
        tl.store(log_p_ptr + row, log_p)
        tl.store(entropy_ptr + row, entropy)


_normalisers_kernel = _tuned(_normalisers, [])
_sums_kernel = _tuned(_sums_and_gradient, ["s_ptr"])
_student_kernel = _tuned(_student_rows, ["s_ptr"])


def _arguments_of(transform: LogitTransform, like: torch.Tensor) -> tuple[torch.Tensor, float, float, bool, bool]:
    bias = like if transform.bias is None else transform.bias
    return (
        bias,
        transform.scale,
        1.0 if transform.softcap is None else transform.softcap,
        transform.bias is not None,
        transform.softcap is not None,
    )


def _announce(divergence: Divergence) -> None:
    """Say once that a divergence has no kernel."""
    if divergence.name not in _announced:
        _announced.add(divergence.name)
        logger.warning("the divergence %s has no Triton kernel: impl='triton' takes the torch sweep for it.", divergence.name)


def _work(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


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
    """As `tiles_torch.sweep`, which takes the divergences that have no kernel."""
    tile = written_tile(divergence)
    if tile is None and teacher is not None:
        _announce(divergence)
        tiles_torch.sweep(
            student,
            teacher,
            student_transform=student_transform,
            teacher_transform=teacher_transform,
            divergence=divergence,
            temperature=temperature,
            statistics=statistics,
            with_gradient=with_gradient,
        )
        return
    kind, parameter = ("forward_kl", 0.0) if tile is None else tile
    rows, vocab = student.shape
    if rows == 0:
        return
    if teacher is None:  # the student stands in for it, and what would be the teacher's is thrown away
        assert not with_gradient
        teacher, teacher_transform = student, student_transform
        unread = statistics.blank(rows)
        unread.student_entropy, unread.candidates = statistics.student_entropy, statistics.candidates
        unread.student_scores, statistics = statistics.student_scores, unread
    work = statistics.divergence.dtype
    s_bias, s_scale, s_cap, has_s_bias, has_s_cap = _arguments_of(student_transform, student)
    t_bias, t_scale, t_cap, has_t_bias, has_t_cap = _arguments_of(teacher_transform, teacher)
    tiles = torch.empty(rows, triton.cdiv(vocab, _TOPK_TILE), dtype=work, device=student.device)
    s_max, t_max, s_log, t_log = torch.empty(4, rows, dtype=work, device=student.device)
    flags = dict(S_BIAS=has_s_bias, S_CAP=has_s_cap, T_BIAS=has_t_bias, T_CAP=has_t_cap, WORK=_work(work), **_block())
    _normalisers_kernel[(rows,)](
        student, teacher, s_bias, t_bias, tiles, s_max, t_max, s_log, t_log,
        vocab, student.stride(0), tiles.shape[1], s_scale, s_cap, t_scale, t_cap, 1.0 / temperature, TILE=_TOPK_TILE, **flags,
    )  # fmt: skip
    ids = top_candidates(student, statistics.candidates.shape[1], tiles, student_transform)
    statistics.candidates.copy_(ids)
    statistics.student_scores.copy_(student_transform.at(student, ids, work))
    statistics.teacher_scores.copy_(teacher_transform.at(teacher, ids, work))
    statistics.agreement.copy_(statistics.teacher_scores[:, 0] == t_max)
    _sums_kernel[(rows,)](
        student, teacher, s_bias, t_bias, s_max, t_max, s_log, t_log,
        statistics.student_entropy, statistics.teacher_entropy, statistics.divergence,
        vocab, student.stride(0), s_scale, s_cap, t_scale, t_cap, 1.0 / temperature, parameter,
        KIND=KINDS[kind], GRADIENT=with_gradient, TINY=torch.finfo(work).tiny, **flags,
    )  # fmt: skip


def entropy_gradient(
    student: torch.Tensor, *, student_transform: LogitTransform, temperature: float, work: torch.dtype
) -> None:
    """As `tiles_torch.entropy_gradient`."""
    _student_gradient(student, None, student_transform, temperature, work)


def sampled_gradient(
    student: torch.Tensor, ids: torch.Tensor, *, student_transform: LogitTransform, temperature: float, work: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tiles_torch.sampled_gradient`."""
    return _student_gradient(student, ids, student_transform, temperature, work)


def _student_gradient(
    student: torch.Tensor, ids: torch.Tensor | None, transform: LogitTransform, temperature: float, work: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = student.shape
    log_p, entropy = torch.zeros(2, rows, dtype=work, device=student.device)
    if rows:
        bias, scale, cap, has_bias, has_cap = _arguments_of(transform, student)
        _student_kernel[(rows,)](
            student, bias, student if ids is None else ids, log_p, entropy, vocab, student.stride(0), scale, cap,
            1.0 / temperature, S_BIAS=has_bias, S_CAP=has_cap, SAMPLED=ids is not None, WORK=_work(work), **_block(),
        )  # fmt: skip
    return log_p, entropy

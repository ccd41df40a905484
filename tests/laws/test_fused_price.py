"""What the engines cost: one projection of each head, no [tokens, vocab] tensor, no read from the device."""

from __future__ import annotations

import logging

import pytest
import torch
from fused_cases import (
    ENGINES,
    EXACT,
    LENGTHS,
    OBJECTIVES,
    TOKENS,
    Products,
    case,
    direct,
    gradients,
    priced,
    sampled,
)
from live import LiveBytes

from tsdkd import TSDKD, Head, TokenBatch, fused
from tsdkd.fused import chunks, run
from tsdkd.selection import SELECTIONS
from tsdkd.types import Objective


@pytest.mark.parametrize("impl", ENGINES)
def test_each_head_is_projected_once(impl):
    n, v, s, t = 64, 1000, 8, 12
    selected = 7  # ceil(0.1 · 64)
    projections, products = n * v * (s + t), 2 * n * v * s
    counted, _, _ = priced(impl)
    entropy = 3 * selected * v * s
    small = n * 10 * s * 4 + n * v  # candidates' columns; the bias's gradient
    assert projections + products + entropy <= counted.work <= projections + products + entropy + small + selected * v


@pytest.mark.parametrize("impl", ENGINES)
def test_a_frozen_head_pays_no_weight_gradient_and_evaluation_pays_none(impl):
    n, v, s, t, selected = 64, 1000, 8, 12, 7
    counted, _, student = priced(impl, frozen=True)
    assert counted.work <= n * v * (s + t) + n * v * s + 2 * selected * v * s + n * 10 * s * 4
    assert student.weight.grad is None
    counted, batch, _ = priced(impl, grad=False)
    assert counted.work == n * v * (s + t) and batch.student_hidden.grad is None


@pytest.mark.parametrize("impl", ENGINES)
def test_no_tensor_of_tokens_times_vocabulary_is_made(impl):
    n, v, chunk = 256, 1000, 16
    counted, _, _ = priced(impl, tokens=n, chunk=chunk)
    assert counted.largest <= max(chunk * v, v * 8 * 2, n * v // 8)


@pytest.mark.parametrize("impl", ["torch"])  # in Triton's interpreter this takes minutes, or reads by itself
def test_nothing_is_read_back_from_the_device(impl, monkeypatch):
    """As on a GPU, where reading waits for the whole queue; on a CPU it is free and saves rows."""
    monkeypatch.setattr(run, "reads_are_free", lambda device: False)
    batch, student, teacher = case(300, 300, tokens=TOKENS)
    expected = TSDKD().loss(batch, student, teacher, impl="reference")
    wanted = gradients(expected.loss, batch, student)
    with Products() as counted:
        terms = TSDKD().loss(batch, student, teacher, impl=impl, counts=TSDKD().counts(LENGTHS))
        got = gradients(terms.loss, batch, student)
    assert counted.reads == []
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    "objective,student_rows,teacher_rows",
    [
        (direct(), 10, 10),
        (direct(selection=SELECTIONS["prefix"](0.5)), 6, 6),
        (direct(selection=SELECTIONS["random"](0.5)), 6, 6),
        (direct(selection=SELECTIONS["top_entropy"](0.5)), 16, 6),
        (direct(selection=SELECTIONS["entropy_or_divergence"](0.5)), 17, 17),
        (TSDKD(direct_weight=0.0, entropy_weight=0.0).objective(), 10, 0),
        (TSDKD(direct_weight=0.0, indirect_weight=0.0).objective(), 13, 0),
        (Objective((sampled(),)), 10, 0),
    ],
)
def test_heads_are_projected_on_what_the_terms_read(objective, student_rows, teacher_rows, monkeypatch):
    batch, student, teacher = case(40, 40)
    rows, project = {"student": 0, "teacher": 0}, run.Run._project

    def counting(self, name, where):
        out = project(self, name, where)
        rows[name] += len(out)
        return out

    monkeypatch.setattr(run.Run, "_project", counting)
    fused.evaluate(objective, batch, student, teacher, impl=ENGINES[0], chunk_tokens=4)
    assert rows == {"student": student_rows, "teacher": teacher_rows}


def test_the_automatic_chunk_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(chunks, "_announced", set())
    with caplog.at_level(logging.INFO, logger="tsdkd.fused.chunks"):
        for _ in range(2):
            assert chunks.choose_chunk("auto", 1000, 50_000, 4, torch.device("cpu")) == 512
    assert len(caplog.records) == 1 and "512 tokens a chunk, 195 MiB" in caplog.text
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 100 * 2**20)
    assert chunks.choose_chunk("auto", 1000, 50_000, 4, torch.device("cpu")) == 26  # a tenth of 100 MiB
    assert chunks.choose_chunk(5, 1000, 50_000, 4, torch.device("cpu")) == 5


@pytest.mark.parametrize("impl", ENGINES)
def test_the_gradient_filter_skips_what_is_small_and_says_how_much(impl):
    """Peaked rows whose favourites share one block: the others are skipped, and little is lost."""
    torch.manual_seed(5)
    weight = 0.02 * torch.randn(4096, 16, dtype=torch.float64)
    weight[:512] *= 100
    hidden = torch.randn(40, 16, dtype=torch.float64)
    teacher = Head(weight + 0.3 * weight.abs().mean() * torch.randn(4096, 16, dtype=torch.float64))
    found = {}
    for smallest in (0.0, 1e-5):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with Products() as counted:
            terms = fused.evaluate(
                OBJECTIVES["gkd"], TokenBatch(h, hidden, (40,)), Head(w), teacher, impl=impl, gradient_filter=smallest
            )
        found[smallest] = (*torch.autograd.grad(terms.loss, (h, w)), counted.work, terms)
    skipped, columns = found[1e-5][3].sums["gradient_filter/skipped"]
    assert skipped > 0.8 * columns and "gradient_filter/skipped" not in found[0.0][3].sums
    assert found[1e-5][2] < 0.65 * found[0.0][2]  # the projections stay, the products shrink
    for exact, close in zip(found[0.0][:2], found[1e-5][:2], strict=True):
        assert 0 < (exact - close).norm() < 0.01 * exact.norm()
    with pytest.raises(ValueError, match="gradient_filter=-1"):
        fused.evaluate(OBJECTIVES["gkd"], TokenBatch(hidden, hidden, (40,)), teacher, teacher, gradient_filter=-1)


def test_a_completions_length_costs_its_gradient_and_little_more():
    """Peak bytes of loss and backward over 8 000 and 32 000 tokens in one completion: beyond the hidden states' own gradient
    (and its copy in their dtype) some hundred bytes a token, whatever the vocabulary."""
    v, s, t = 300, 16, 24
    heads = torch.randn(v, s).requires_grad_(), torch.randn(v, t)
    peaks = []
    for n in (8_000, 32_000):
        ours, theirs = torch.randn(n, s).requires_grad_(), torch.randn(n, t)
        batch = TokenBatch(ours, theirs, (n,), token_ids=torch.zeros(n, dtype=torch.long))
        with LiveBytes([ours, theirs, *heads]) as live:
            start = live.now()
            TSDKD().loss(batch, Head(heads[0]), Head(heads[1]), impl="torch", chunk_tokens=256).loss.backward()
        peaks.append(live.peak - start - 2 * 4 * n * s)
    assert peaks[1] - peaks[0] < 24_000 * 500

"""Every engine computes the reference's loss and gradients."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from fused_cases import (
    ENGINES,
    EXACT,
    OBJECTIVES,
    case,
    gradients,
)
from hypothesis import given
from hypothesis import strategies as st

from tsdkd import Head, fused, fused_tsd_kd_loss, tsd_kd_loss
from tsdkd.fused import tiles_torch


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("vocab,teacher_vocab,chunk", [(12, 14, 3), (128, 120, 1), (300, 320, "auto")])
def test_values_and_gradients_equal_the_reference(impl, name, vocab, teacher_vocab, chunk):
    batch, student, teacher = case(vocab, teacher_vocab)
    objective = OBJECTIVES[name]
    expected = fused.evaluate(objective, batch, student, teacher, impl="reference")
    ours = fused.evaluate(objective, batch, student, teacher, impl=impl, chunk_tokens=chunk)
    for field in ("loss", "indirect", "direct", "entropy", "sampled", "ranking_nll", "candidate_tau"):
        torch.testing.assert_close(getattr(ours, field).detach(), getattr(expected, field).detach(), **EXACT)
    assert list(ours.terms) == list(expected.terms)
    for term, found in ours.terms.items():
        for field in ("value", "tokens", "weights", "per_token"):
            a, b = getattr(found, field).detach(), getattr(expected.terms[term], field).detach()
            torch.testing.assert_close(a.double(), b.double(), **EXACT)
    for part in ("statistics", "weights"):
        for field in dataclasses.fields(getattr(ours, part)):
            if field.name == "rows":
                continue
            if getattr(getattr(expected, part), field.name) is None:
                assert getattr(getattr(ours, part), field.name) is None
                continue
            a, b = (getattr(getattr(terms, part), field.name) for terms in (ours, expected))
            torch.testing.assert_close(a.double(), b.double(), **EXACT)
    for key, (total, count) in expected.sums.items():
        torch.testing.assert_close(float(ours.sums[key][0]), float(total), **EXACT)
        assert float(ours.sums[key][1]) == float(count)
    for a, b in zip(gradients(ours.loss, batch, student), gradients(expected.loss, batch, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert not (ours.indirect.requires_grad or ours.direct.requires_grad or ours.entropy.requires_grad)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
def test_the_public_function_equals_the_oracle(impl):
    """Plain Python from hidden states to the gradient of every input."""
    hidden_s, hidden_t = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)
    weight_s, weight_t = torch.randn(9, 3, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
    options = dict(num_candidates=4, opener_entropy_share=0.4, top_entropy_fraction=0.3)
    flat = torch.cat([hidden_s.flatten(), weight_s.flatten()]).tolist()

    def oracle(x):
        h, w = x[: hidden_s.numel()], x[hidden_s.numel() :]
        responses = []
        for i in range(2):
            tokens = []
            for j in range(4):
                if mask[i, j]:
                    state = h[(i * 4 + j) * 3 : (i * 4 + j + 1) * 3]
                    ours = [sum(a * b for a, b in zip(state, w[3 * v : 3 * v + 3], strict=True)) for v in range(9)]
                    tokens.append((ours, (weight_t @ hidden_t[i, j]).tolist()))
            responses.append(tokens)
        return oracles.tsd_kd(responses, **options)["loss"]

    hidden_s.requires_grad_(), weight_s.requires_grad_()
    terms = fused_tsd_kd_loss(hidden_s, weight_s, hidden_t, weight_t, mask, impl=impl, **options)
    torch.testing.assert_close(terms.loss.item(), oracle(flat), **EXACT)
    terms.loss.backward()
    ours = torch.cat([hidden_s.grad.flatten(), weight_s.grad.flatten()])
    torch.testing.assert_close(ours, torch.tensor(oracles.gradient(oracle, flat), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_stands_at_masked_positions_changes_nothing_and_gets_a_zero_gradient(impl, junk):
    head, teacher_head = torch.randn(20, 4), torch.nn.Linear(6, 22)
    hidden, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    results = []
    for value in (0.0, junk):
        x = hidden.masked_fill(mask.unsqueeze(-1) == 0, value).requires_grad_()
        terms = fused_tsd_kd_loss(x, head, teacher.masked_fill(mask.unsqueeze(-1) == 0, value), teacher_head, mask, impl=impl)
        terms.loss.backward()
        results.append((terms.loss.item(), x.grad, terms.student_entropy))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])
    assert (results[1][1][mask == 0] == 0).all() and results[1][1].abs().sum() > 0


@pytest.mark.parametrize("impl", ENGINES)
def test_heads_come_as_tensors_linears_or_heads(impl):
    hidden, teacher, mask = torch.randn(2, 4, 5), torch.randn(2, 4, 6), torch.ones(2, 4)
    linear, other = torch.nn.Linear(5, 30), torch.nn.Linear(6, 30, bias=False)
    expected = tsd_kd_loss(linear(hidden), other(teacher), mask)
    for head in (linear, Head(linear.weight, linear.bias)):
        ours = fused_tsd_kd_loss(hidden, head, teacher, other.weight, mask, impl=impl)
        torch.testing.assert_close(ours.loss, expected.loss.detach(), rtol=1e-5, atol=0)
        assert torch.equal(ours.opener_mask, expected.opener_mask)


@pytest.mark.parametrize("impl", ENGINES)
def test_nothing_left_gives_a_zero_that_can_be_backpropagated(impl):
    head = torch.randn(20, 4, requires_grad=True)
    for mask in (torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(2, 0)):
        hidden = torch.randn(*mask.shape, 4, requires_grad=True)
        terms = fused_tsd_kd_loss(hidden, head, torch.randn(*mask.shape, 6), torch.randn(20, 6), mask, impl=impl)
        (terms.loss * 2).backward()
        assert terms.loss.item() == 0 and (hidden.grad == 0).all() and (head.grad == 0).all()


@given(st.lists(st.integers(-3, 3), min_size=5, max_size=400), st.integers(2, 5))
def test_candidates_are_exact_with_ties(values, k):
    logits = torch.tensor([values, values[::-1]], dtype=torch.float64)
    ids = tiles_torch.top_candidates(logits, k, tiles_torch.tile_maxima(logits))
    assert ids.tolist() == [oracles.candidates(row, k) for row in logits.tolist()]

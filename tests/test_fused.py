"""Every engine computes the reference's loss and gradients, at the price that is promised and without keeping logits."""

from __future__ import annotations

import dataclasses
import logging
import math
import os

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from tsdkd import TSDKD, Head, TokenBatch, fused, fused_tsd_kd_loss, tsd_kd_loss
from tsdkd.fused import chunks, run, tiles_torch
from tsdkd.losses import resolve_divergence
from tsdkd.selection import SELECTIONS, EntropyGapGate, TopEntropy, direct_count
from tsdkd.types import Counts, DivergenceTerm, EntropyTerm, Objective, RankingTerm, ReadPlan, SampledTerm

# Triton runs in its interpreter (TRITON_INTERPRET=1), chosen when it is imported: `make test` runs this file once more.
ENGINES = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch"]
EXACT = dict(rtol=1e-9, atol=1e-9)
LENGTHS = (6, 1, 0, 3)
TOKENS = sum(LENGTHS)
SHIFTS = torch.linspace(-2.0, 1.0, TOKENS)


def case(vocab=12, teacher_vocab=14, hidden=5, teacher_hidden=7, dtype=torch.float64, tokens=TOKENS, scale=1.0, **shape):
    """Hidden states, heads with every factor, and the responses' lengths."""
    student = Head(
        (scale * torch.randn(vocab, hidden, dtype=dtype)).requires_grad_(),
        torch.randn(vocab, dtype=dtype).requires_grad_(),
        **{"logit_scale": 0.7, "softcap": 4.0, **shape},
    )
    teacher = Head(scale * torch.randn(teacher_vocab, teacher_hidden, dtype=dtype), logit_scale=1.3)
    batch = TokenBatch(
        torch.randn(tokens, hidden, dtype=dtype).requires_grad_(),
        torch.randn(tokens, teacher_hidden, dtype=dtype),
        LENGTHS if tokens == TOKENS else (tokens,),
        token_ids=torch.randint(0, min(vocab, teacher_vocab), (tokens,)),
        rows=(40, 7, 8, 22) if tokens == TOKENS else None,
    )
    return batch, student, teacher


def direct(divergence="generalized_jsd", parameter=0.9, temperature=1.0, more=(), **term):
    """An objective with one divergence term, and others after it."""
    resolved = resolve_divergence(divergence, beta=parameter, alpha=parameter)
    return Objective((DivergenceTerm(name="direct", divergence=resolved, **term), *more), temperature)


def sampled(function=lambda log_p, rows: -log_p, weight=1.0):
    return SampledTerm(name="sampled", weight=weight, function=function)


def gradients(loss, batch, head):
    wanted = [t for t in (batch.student_hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    return torch.autograd.grad(loss, wanted)


OBJECTIVES = {
    "tsd_kd": TSDKD().objective(),
    "gkd": TSDKD(gate="none", indirect_weight=0.0, entropy_weight=0.0).objective(),
    "ranking alone": TSDKD(direct_weight=0.0, entropy_weight=0.0, opener_entropy_share=1.0).objective(),
    "entropy alone": TSDKD(direct_weight=0.0, indirect_weight=0.0, top_entropy_fraction=0.5).objective(),
    "tempered": TSDKD(kd_temperature=1.7, opener_entropy_share=0.5, top_entropy_fraction=0.4, num_candidates=4).objective(),
    **{f"beta {b}": TSDKD(beta=b).objective() for b in (0.0, 0.3, 1.0)},
    "options": TSDKD(ranking_stage_weights="teacher_mass", entropy_target="teacher", gate="divergence_aware").objective(),
    "ranking by mass, alone": TSDKD(
        direct_weight=0.0, entropy_weight=0.0, opener_entropy_share=1.0, ranking_stage_weights="teacher_mass"
    ).objective(),
    "to the teacher's entropy, alone": TSDKD(
        direct_weight=0.0, indirect_weight=0.0, top_entropy_fraction=1.0, entropy_target="teacher"
    ).objective(),
    **{f"all terms, {name} selected": TSDKD(selection=name, selection_share=0.4).objective() for name in SELECTIONS},
    **{
        f"{name} selected alone": direct(parameter=0.5, gate=EntropyGapGate(), selection=rule(0.4))
        for name, rule in SELECTIONS.items()
    },
    "a selection of one's own": direct(selection=lambda s: s.divergence > 0.5 * s.divergence.mean(-1, keepdim=True)),
    "entropy target and a selection": TSDKD(entropy_target="teacher", selection="random", indirect_weight=0.0).objective(),
    "sampled tokens": Objective((sampled(),)),
    "sampled tokens beside reverse KL": direct(
        "reverse_kl", temperature=1.3, more=[sampled(lambda log_p, rows: (log_p - SHIFTS[rows].to(log_p)).exp(), 0.7)]
    ),
    "two divergences, a gate and a selection": direct(
        "forward_kl",
        gate=EntropyGapGate(),
        more=[
            DivergenceTerm(
                name="other",
                weight=0.3,
                divergence=resolve_divergence("skew_reverse_kl"),
                gate=EntropyGapGate(2.0),
                selection=SELECTIONS["opener"](0.5),
            )
        ],
    ),
    "two selected divergences": direct(
        "forward_kl",
        selection=SELECTIONS["prefix"](0.4),
        more=[
            DivergenceTerm(name="other", divergence=resolve_divergence("reverse_kl"), selection=SELECTIONS["top_entropy"](0.5))
        ],
    ),
    "two of every kind": Objective(
        (
            RankingTerm(name="a", num_candidates=3, selection=SELECTIONS["opener"](0.4)),
            RankingTerm(name="b", num_candidates=6, weight=0.2, gate=EntropyGapGate()),
            EntropyTerm(name="c", selection=TopEntropy(0.3)),
            EntropyTerm(name="d", target="teacher", weight=0.5, gate=EntropyGapGate()),
            SampledTerm(name="e", function=lambda log_p, rows: -log_p, selection=SELECTIONS["random"](0.5)),
            SampledTerm(name="f", function=lambda log_p, rows: log_p.exp(), gate=EntropyGapGate(), weight=0.7),
        )
    ),
    "a divergence of one's own": direct(lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2, temperature=1.3),
    "a divergence of one's own, selected": direct(
        lambda s, t: (s.log_softmax(-1) - t.log_softmax(-1)).square().mean(-1),
        gate=EntropyGapGate(),
        selection=SELECTIONS["entropy_or_divergence"](0.5),
    ),
    **{
        f"{name}({parameter})": direct(name, parameter, gate=EntropyGapGate(), temperature=1.3)
        for name in ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl")
        for parameter in ((0.0,) if name in ("forward_kl", "reverse_kl") else (0.0, 0.1, 0.7))
    },
}


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


# ---------------------------------------------------------------------- the price


class Products(TorchDispatchMode):
    """Counts multiply-adds of products, the largest tensor made, and reads from the device."""

    def __init__(self):
        super().__init__()
        self.work, self.largest, self.reads = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            a, b = args[-2:] if name != "addmm_" else args[1:3]
            self.work += a.numel() * b.shape[-1]
        if name in ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique"):
            self.reads.append(name)
        out = func(*args, **(kwargs or {}))
        made = [
            t
            for t in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        return out


def priced(impl, tokens=64, vocab=1000, frozen=False, grad=True, objective=None, chunk=16):
    batch, student, teacher = case(vocab, vocab, hidden=8, teacher_hidden=12, dtype=torch.float32, tokens=tokens)
    if frozen:
        student = Head(student.weight.detach(), student.bias.detach(), student.logit_scale, student.softcap)
    with torch.set_grad_enabled(grad), Products() as counted:
        terms = fused.evaluate(objective or TSDKD().objective(), batch, student, teacher, impl=impl, chunk_tokens=chunk)
        if grad:
            terms.loss.backward()
    return counted, batch, student


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


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("objective", ["tsd_kd", "gkd", "beta 0.0", "beta 1.0", "skew_forward_kl(0.1)", "skew_reverse_kl(0.1)"])
def test_float32_error_against_float64_is_below_1e_5(impl, objective):
    batch, student, teacher = case(
        5000, 5100, hidden=64, teacher_hidden=96, tokens=64, scale=0.4, softcap=None, logit_scale=1.0
    )
    single = TokenBatch(batch.student_hidden.detach().float().requires_grad_(), batch.teacher_hidden.float(), batch.lengths)
    head = Head(student.weight.detach().float().requires_grad_(), student.bias.detach().float().requires_grad_())
    exact_head = Head(head.weight.detach().double().requires_grad_(), head.bias.detach().double().requires_grad_())
    exact_batch = TokenBatch(
        single.student_hidden.detach().double().requires_grad_(), single.teacher_hidden.double(), batch.lengths
    )
    low_teacher = Head(teacher.weight.float(), logit_scale=1.3)
    exact_teacher = Head(low_teacher.weight.double(), logit_scale=1.3)
    ours = fused.evaluate(OBJECTIVES[objective], single, head, low_teacher, impl=impl)
    exact = fused.evaluate(OBJECTIVES[objective], exact_batch, exact_head, exact_teacher, impl="reference")
    for name in ("opener", "top_entropy"):  # the same selection, else the comparison means nothing
        assert torch.equal(getattr(ours.weights, name), getattr(exact.weights, name))
    assert abs(ours.loss.item() - exact.loss.item()) <= 1e-5 * abs(exact.loss.item())
    for a, b in zip(gradients(ours.loss, single, head), gradients(exact.loss, exact_batch, exact_head), strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("impl", ENGINES)
def test_bfloat16_is_no_worse_than_naive_torch_and_an_allowance(impl):
    """Both against float64, from the same bf16 inputs; the allowance is one more rounding of the logits' gradient."""
    batch, student, teacher = case(
        3000, 3000, hidden=64, teacher_hidden=96, tokens=96, scale=0.4, softcap=None, logit_scale=1.0
    )
    low = [t.detach().to(torch.bfloat16) for t in (batch.student_hidden, student.weight, batch.teacher_hidden, teacher.weight)]
    objective = OBJECTIVES["gkd"]

    def run(dtype, engine):
        h, w, ht, wt = (t.to(dtype) for t in low)
        h, w = h.requires_grad_(), w.requires_grad_()
        terms = fused.evaluate(objective, TokenBatch(h, ht, batch.lengths), Head(w), Head(wt), impl=engine)
        return terms.loss.detach().double(), [g.double() for g in torch.autograd.grad(terms.loss, (h, w))]

    exact_loss, exact = run(torch.float64, "reference")
    naive_loss, naive = run(torch.bfloat16, "reference")
    our_loss, ours = run(torch.bfloat16, impl)
    assert (our_loss - exact_loss).abs() <= (naive_loss - exact_loss).abs() + 2**-8 * exact_loss
    for a, b, e in zip(ours, naive, exact, strict=True):
        assert (a - e).norm() <= (b - e).norm() + 2**-8 * e.norm()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype,most", [(torch.float32, 0), (torch.bfloat16, 6)])
def test_disagreements_of_selection_are_few_and_at_the_edge(impl, dtype, most):
    """Counted apart from values: a token is chosen otherwise than in float64 only where rounding reaches the deciding value."""
    lengths, share = (150, 90, 60), 0.1
    weights = [torch.randn(2000, size, dtype=torch.float64).mul(0.3).to(dtype) for size in (64, 96)]
    hidden = [torch.randn(sum(lengths), size, dtype=torch.float64).to(dtype) for size in (64, 96)]

    def run(kind, engine):
        h, ht, w, wt = (t.to(kind) for t in (*hidden, *weights))
        method = TSDKD(opener_entropy_share=share, top_entropy_fraction=share)
        return method.loss(TokenBatch(h, ht, lengths), Head(w), Head(wt), impl=engine)

    ours, exact = run(dtype, impl), run(torch.float64, "reference")
    reach = 2 * (ours.student_entropy - exact.student_entropy).abs().max()
    top = ours.top_entropy_mask != exact.top_entropy_mask
    threshold = torch.where(exact.top_entropy_mask, exact.student_entropy, math.inf).amin(-1, keepdim=True)
    assert ((exact.student_entropy - threshold).abs()[top] <= reach).all()
    opener = ours.opener_mask != exact.opener_mask
    cumulative = exact.student_entropy.cumsum(-1)
    # An end moves only where the sum stands within all the tokens' rounding of the share.
    distance = (cumulative - share * cumulative[:, -1:]).abs() - exact.student_entropy
    assert (distance <= reach * torch.tensor(lengths).unsqueeze(-1))[opener].all()
    assert int(top.sum()) + int(opener.sum()) <= most


@pytest.mark.parametrize("impl", ["torch"])  # in Triton's interpreter this takes minutes, or reads by itself
def test_the_weight_gradient_does_not_drift_over_fifty_steps(impl):
    """A head trained by the fused loss in many chunks stays with one trained on full logits; bf16 parts add up in float32."""
    torch.manual_seed(3)
    hidden, teacher = torch.randn(200, 16), torch.randn(200, 24)
    start, other = torch.randn(400, 16) * 0.3, Head(torch.randn(400, 24) * 0.3)
    objective, ends = OBJECTIVES["gkd"], []
    for engine, options in (("reference", {}), (impl, {"chunk_tokens": 7})):
        weight = start.clone().requires_grad_()
        for _ in range(50):
            loss = fused.evaluate(
                objective, TokenBatch(hidden, teacher, (200,)), Head(weight), other, impl=engine, **options
            ).loss
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = (weight - 20.0 * gradient).detach().requires_grad_()
        ends.append(weight.detach())
    moved = (ends[0] - start).norm()
    assert moved > 0.1 and (ends[0] - ends[1]).norm() <= 1e-5 * moved


@pytest.mark.parametrize("impl", ENGINES)
def test_autocast_runs_the_products_in_bfloat16(impl):
    batch, student, teacher = case(500, 500, hidden=32, teacher_hidden=48, dtype=torch.float32, scale=0.4, softcap=None)
    exact = fused.evaluate(OBJECTIVES["gkd"], batch, student, teacher, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        low = fused.evaluate(OBJECTIVES["gkd"], batch, student, teacher, impl="reference")
        ours = fused.evaluate(OBJECTIVES["gkd"], batch, student, teacher, impl=impl)
    assert ours.loss.dtype == torch.float32 and ours.loss.item() != exact.loss.item()
    assert abs(ours.loss - exact.loss) <= abs(low.loss - exact.loss) + 2**-8 * exact.loss
    grads = gradients(ours.loss, batch, student)
    assert {g.dtype for g in grads} == {torch.float32}
    for g, e in zip(grads, gradients(exact.loss, batch, student), strict=True):
        assert (g - e).norm() <= 0.02 * e.norm()  # a few bf16 roundings (2^-9 each) of every factor


@pytest.mark.parametrize("impl", ENGINES)
def test_huge_and_peaked_logits_stay_finite(impl):
    weight = torch.eye(40, 8) * 1e4
    for temperature in (1.0, 0.5):
        hidden = torch.eye(8)[None, :6].clone().requires_grad_()
        terms = fused_tsd_kd_loss(
            hidden, weight, torch.eye(8)[None, 1:7], weight.flip(0), torch.ones(1, 6), impl=impl, temperature=temperature
        )
        terms.loss.backward()
        assert torch.isfinite(terms.loss) and torch.isfinite(hidden.grad).all()


# ---------------------------------------------------------------------- inside a model


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tied_embeddings_checkpointing_and_compile(impl, compiled, checkpointing):
    ids, mask = torch.randint(64, (2, 9)), torch.ones(2, 9)
    teacher = tiny_model(seed=2, hidden=48)
    found = []
    for engine in ("reference", impl):
        torch.manual_seed(0)
        model = tiny_model(seed=1)
        model.lm_head.weight = model.model.embed_tokens.weight
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        backbone = torch.compile(model.model, backend="aot_eager") if compiled else model.model
        hidden = backbone(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            other = teacher.model(ids).last_hidden_state
        fused_tsd_kd_loss(hidden, model.lm_head, other, teacher.lm_head, mask, impl=engine).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize("impl", ENGINES)
def test_a_sharded_head_is_gathered_once_per_call(impl, tmp_path, monkeypatch):
    """FSDP2's `fully_shard` on a CPU mesh: the parameter is a DTensor, and so is its gradient."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, teacher = torch.nn.Linear(5, 40), torch.randn(44, 6)
        sharded = torch.nn.Linear(5, 40)
        sharded.load_state_dict(plain.state_dict())
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(sharded.weight, DTensor)
        gathered = []
        original = DTensor.full_tensor
        monkeypatch.setattr(DTensor, "full_tensor", lambda self, **kw: (gathered.append(self.shape), original(self, **kw))[1])
        hidden, other, mask = torch.randn(2, 6, 5), torch.randn(2, 6, 6), torch.ones(2, 6)
        expected = fused_tsd_kd_loss(hidden, plain, other, teacher, mask, impl=impl)
        expected.loss.backward()
        ours = fused_tsd_kd_loss(hidden, Head(sharded.weight, sharded.bias), other, teacher, mask, impl=impl, chunk_tokens=2)
        assert len(gathered) == 2  # weight and bias, whatever the chunks
        ours.loss.backward()
        torch.testing.assert_close(ours.loss, expected.loss)
        assert isinstance(sharded.weight.grad, DTensor)
        torch.testing.assert_close(original(sharded.weight.grad), plain.weight.grad)
        torch.testing.assert_close(original(sharded.bias.grad), plain.bias.grad)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- rules of a user's own, and refusals


@pytest.mark.parametrize("impl", ENGINES)
def test_rules_of_a_users_own_are_fused_too(impl):
    batch, student, teacher = case(60, 60)

    def disagreeing(statistics):  # needs both models; not known from lengths
        return (statistics.top1_agreement == 0) & (statistics.divergence > statistics.divergence.median())

    objective = direct(
        gate=lambda s: 1.0 / (1.0 + s.teacher_entropy),
        more=[
            RankingTerm(name="indirect", weight=0.3, num_candidates=5, selection=disagreeing),
            EntropyTerm(name="entropy", weight=0.2, selection=disagreeing),
        ],
    )
    expected = fused.evaluate(objective, batch, student, teacher, impl="reference")
    ours = fused.evaluate(objective, batch, student, teacher, impl=impl, chunk_tokens=4)
    assert expected.weights.opener.sum() > 1
    torch.testing.assert_close(ours.loss.detach(), expected.loss.detach(), **EXACT)
    for a, b in zip(gradients(ours.loss, batch, student), gradients(expected.loss, batch, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", ["opener", "top_entropy", "entropy_or_divergence", "random", "prefix"])
def test_a_selected_direct_term_does_not_depend_on_the_split(impl, name):
    """Row by row, with the whole step's counts, the loss and gradient of the whole."""
    batch, student, teacher = case(40, 40)
    objective = direct(selection=SELECTIONS[name](0.4), gate=EntropyGapGate())
    counts = Counts(TOKENS, 0, 3, direct_count(SELECTIONS[name](0.4), LENGTHS))
    whole = fused.evaluate(objective, batch, student, teacher, counts=counts, impl=impl)
    alone = fused.evaluate(objective, batch, student, teacher, impl=impl)
    torch.testing.assert_close(whole.loss.detach(), alone.loss.detach(), **EXACT)
    expected = gradients(whole.loss, batch, student)
    parts, start = 0.0, 0
    for row, length in enumerate(LENGTHS):
        index = torch.arange(start, start + length)
        part = dataclasses.replace(batch.keep(index, (length,)), rows=(batch.rows[row],))
        parts = parts + fused.evaluate(objective, part, student, teacher, counts=counts, impl=impl).loss
        start += length
    torch.testing.assert_close(parts.detach(), whole.loss.detach(), **EXACT)
    for a, b in zip(gradients(parts, batch, student), expected, strict=True):
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


def plan_of(batch, teacher):
    return ReadPlan(batch.lengths, batch.lengths, tuple(teacher))


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize("name", ["opener selected alone", "ranking on the opener"])
def test_what_the_teacher_did_not_read_changes_nothing(impl, name):
    """The opener is the student's to find; behind it the teacher's hidden states may be anything."""
    batch, student, teacher = case(40, 40)
    ranking = TSDKD(direct_weight=0.0, opener_entropy_share=0.4, top_entropy_fraction=0.4).objective()
    objective = {**OBJECTIVES, "ranking on the opener": ranking}[name]
    expected = fused.evaluate(objective, batch, student, teacher, impl=impl)
    is_direct = "direct" in expected.terms
    opener = expected.weights.selected if is_direct else expected.opener_mask
    lengths = tuple(opener.sum(-1).tolist())
    junk = torch.where(opener[expected.mask].unsqueeze(-1), batch.teacher_hidden, torch.full((), 1e3, dtype=torch.float64))
    part = dataclasses.replace(batch, teacher_hidden=junk, plan=plan_of(batch, lengths))
    ours = fused.evaluate(objective, part, student, teacher, impl=impl)
    torch.testing.assert_close(ours.loss.detach(), expected.loss.detach(), **EXACT)
    wanted = gradients(expected.loss, batch, student)
    for a, b in zip(gradients(ours.loss, part, student), wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    fewer = dataclasses.replace(part, plan=plan_of(batch, [min(1, n) for n in lengths]))
    clipped = fused.evaluate(objective, fewer, student, teacher, impl=impl)
    chosen = clipped.weights.selected if is_direct else clipped.opener_mask
    assert chosen.sum(-1).tolist() == [min(1, n) for n in lengths]
    with pytest.raises(ValueError, match="reads the teacher on every token"):
        fused.evaluate(direct(), part, student, teacher, impl=impl)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
def test_a_loss_that_reads_no_teacher_needs_none(impl):
    batch, student, teacher = case(40, 40)
    objective = Objective((sampled(),))
    alone = dataclasses.replace(batch, teacher_hidden=None)
    with_teacher = fused.evaluate(objective, batch, student, teacher, impl=impl).loss.detach()
    without = fused.evaluate(objective, alone, student, None, impl=impl).loss.detach()
    torch.testing.assert_close(without, with_teacher)
    logits = student.logits(batch.student_hidden).detach()
    torch.testing.assert_close(with_teacher, torch.nn.functional.cross_entropy(logits, batch.token_ids))
    with pytest.raises(ValueError, match="no hidden states or no head of one were given"):
        fused.evaluate(direct(), alone, student, None, impl=impl)
    with pytest.raises(ValueError, match=r"TokenBatch\.token_ids is None"):
        fused.evaluate(objective, dataclasses.replace(batch, token_ids=None), student, None, impl=impl)
    with pytest.raises(ValueError, match="counts say nothing of the tokens that the direct term selects"):
        fused.evaluate(direct(selection=SELECTIONS["random"](0.5)), batch, student, teacher, counts=Counts(1, 1, 1))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("needs", ["student", "both"])
def test_a_gate_that_reads_other_tokens_costs_a_sweep_and_is_exact(impl, needs, caplog):
    class Relative:
        def __init__(self):
            self.needs = needs

        def __call__(self, statistics):
            value = statistics.student_entropy if needs == "student" else statistics.divergence
            mean = (value * statistics.mask).sum(-1, keepdim=True) / statistics.mask.sum(-1, keepdim=True).clamp(min=1)
            return torch.sigmoid(value - mean)

    batch, student, teacher = case(60, 60)
    objective = direct(gate=Relative())
    expected = fused.evaluate(objective, batch, student, teacher, impl="reference")
    with caplog.at_level(logging.INFO, logger="tsdkd.fused.reads"):
        ours = fused.evaluate(objective, batch, student, teacher, impl=impl, chunk_tokens=4)
    assert ("the student's head" if needs == "student" else "both heads") + " ahead of the loss" in caplog.text
    torch.testing.assert_close(ours.loss.detach(), expected.loss.detach(), **EXACT)
    for a, b in zip(gradients(ours.loss, batch, student), gradients(expected.loss, batch, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize(
    "name,options",
    [
        ("generalized_jsd", {"beta": 0.3}),
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("skew_forward_kl", {"alpha": 0.2}),
        ("skew_reverse_kl", {"alpha": 0.2}),
    ],
)
def test_the_doors_divergences_are_token_means_of_the_losses(impl, name, options):
    from tsdkd import losses

    batch, student, teacher = case(30, 30)
    ours = getattr(fused, name)(batch, student, teacher, temperature=1.5, impl=impl, **options)
    expected = getattr(losses, name)(
        student.logits(batch.student_hidden), teacher.logits(batch.teacher_hidden), *options.values(), temperature=1.5
    )
    torch.testing.assert_close(ours.loss.detach(), expected.mean().detach(), **EXACT)
    statistics = fused.token_statistics(batch, student, teacher, impl=impl)
    torch.testing.assert_close(
        statistics.student_entropy[statistics.mask],
        losses.token_entropy(student.logits(batch.student_hidden)).detach(),
        **EXACT,
    )


@pytest.mark.parametrize("impl", ENGINES)
def test_a_second_backward_is_refused(impl):
    batch, student, teacher = case()
    loss = TSDKD().loss(batch, student, teacher, impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backpropagated a second time.*impl='reference'"):
        loss.backward()


@pytest.mark.parametrize("impl", ENGINES)
def test_bad_input_is_refused(impl):
    hidden, teacher, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 6), torch.ones(2, 3)
    arguments = dict(
        student_hidden=hidden,
        student_head=torch.randn(20, 4),
        teacher_hidden=teacher,
        teacher_head=torch.randn(20, 6),
        completion_mask=mask,
        impl=impl,
    )
    broken, worse = hidden.clone(), teacher.clone()
    broken[1, 2, 0] = float("nan")
    worse[0, 1] = float("inf")
    for wrong, message in [
        ({"chunk_tokens": 0}, "chunk_tokens=0: a chunk holds one token or more"),
        ({"chunk_tokens": "many"}, "chunk_tokens='many'"),
        ({"student_head": torch.randn(20, 5)}, "student_hidden has 4 features but the student's head takes 5"),
        ({"teacher_head": torch.randn(20)}, r"a head's weight is \[vocab, hidden\]"),
        ({"teacher_head": torch.randn(0, 6)}, r"got the shape \(0, 6\): with no ids in it two heads share none"),
        ({"student_hidden": broken}, r"student_hidden holds a NaN or Inf at a trained token \(response 1, token 2; 1 tokens"),
        ({"teacher_hidden": worse}, r"teacher_hidden holds a NaN or Inf at a trained token \(response 0, token 1"),
        ({"student_hidden": hidden.to("meta")}, "student_hidden is on meta but teacher_hidden is on cpu"),
        ({"student_head": torch.randn(20, 4, device="meta")}, "the student's head is on meta"),
        ({"num_candidates": 21}, "num_candidates=21 but the shared vocabulary has 20"),
        ({"lmbda": 0.5}, "has no option 'lmbda'; it has: indirect_weight, .*, temperature, "),
        ({"temperature": -1.0}, "kd_temperature=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused_tsd_kd_loss(**{**arguments, **wrong})


def test_the_automatic_chunk_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(chunks, "_announced", set())
    with caplog.at_level(logging.INFO, logger="tsdkd.fused.chunks"):
        for _ in range(2):
            assert chunks.choose_chunk("auto", 1000, 50_000, 4, torch.device("cpu")) == 512
    assert len(caplog.records) == 1 and "512 tokens a chunk, 195 MiB" in caplog.text
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 100 * 2**20)
    assert chunks.choose_chunk("auto", 1000, 50_000, 4, torch.device("cpu")) == 26  # a tenth of 100 MiB
    assert chunks.choose_chunk(5, 1000, 50_000, 4, torch.device("cpu")) == 5


def test_top_entropys_count_is_known_from_lengths():
    assert EntropyTerm(name="e", selection=TopEntropy(0.1)).kept((100, 5, 0)) == 11
    assert EntropyTerm(name="e", selection=lambda s: s.mask).kept((100,)) is None


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

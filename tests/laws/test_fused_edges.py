"""Numbers at the edge: ids that a model masks, in one model or in both, and logits beyond all measure, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from fused_cases import ENGINES

from tsdkd import Head, TokenBatch, fused
from tsdkd.losses import DIVERGENCES, plackett_luce_nll, resolve_divergence, token_entropy
from tsdkd.methods import AKL, TAID
from tsdkd.selection import EntropyGapGate, TopEntropy
from tsdkd.types import DivergenceTerm, EntropyTerm, Objective, RankingTerm, SampledTerm

VOCAB, TOKENS = 24, 6
NAMED = {name: resolve_divergence(name) for name in DIVERGENCES}
NAMED |= {"akl": AKL().divergence_of(), "taid": TAID().divergence_of()}


def masked(which, scale=1.0, dtype=torch.float64):
    """Logits of both models; some ids are impossible to the `teacher`, to the `student`, to `both`, or to `neither`."""
    torch.manual_seed(3)
    student, teacher = (scale * torch.randn(TOKENS, VOCAB, dtype=torch.float64) for _ in range(2))
    if which in ("teacher", "both"):
        teacher[:, 15:] = -math.inf
    if which in ("student", "both"):
        student[:, 18:] = -math.inf
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def by_hand(name, s, t):
    """The divergence from probabilities alone, 0 · log 0 = 0; its gradient is autograd's on the ids that the student has."""
    there = torch.isfinite(s)
    p = torch.zeros_like(s).masked_scatter(there, s[there].softmax(-1))
    q = t.softmax(-1)

    def kl(a, b):
        kept = a > 0
        return (a[kept] * (a[kept].log() - b[kept].log())).sum()

    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    if name == "generalized_jsd":
        m = 0.9 * q + 0.1 * p
        return 0.9 * kl(q, m) + 0.1 * kl(p, m)
    if name == "skew_forward_kl":
        return kl(q, 0.1 * q + 0.9 * p)
    return kl(p, 0.9 * q + 0.1 * p)


@pytest.mark.parametrize("which", ["teacher", "student", "both"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_impossible_id_counts_nothing_where_it_has_no_mass(name, which):
    student, teacher = masked(which)
    values = NAMED[name](student, teacher)
    for row in range(TOKENS):
        s = student[row].detach().requires_grad_()
        expected = by_hand(name, s, teacher[row])
        assert values[row].item() == pytest.approx(expected.item(), rel=1e-12)
        if expected.isfinite():
            (wanted,) = torch.autograd.grad(expected, s)
            (gradient,) = torch.autograd.grad(values[row], student, retain_graph=True)
            torch.testing.assert_close(gradient[row], wanted, rtol=1e-9, atol=1e-12)
    # The forward KL is infinite where the student rules out what the teacher has, the reverse where it is the other way.
    infinite = {"forward_kl": which in ("student",), "reverse_kl": which in ("teacher", "both")}.get(name, False)
    assert values.isinf().all() if infinite else values.isfinite().all()


def evaluated(objective, student, teacher, impl, dtype):
    """An objective on logits, as hidden states of an identity head would give them: the bias masks what it may."""
    eye = torch.eye(VOCAB, dtype=dtype)
    biases = [torch.where(z[0].detach().isinf(), -math.inf, 0.0).to(dtype) for z in (student, teacher)]
    hidden = [z.detach().masked_fill(z.detach().isinf(), 0.0).to(dtype) for z in (student, teacher)]
    hidden[0].requires_grad_()
    batch = TokenBatch(hidden[0], hidden[1], (4, 2), token_ids=torch.arange(TOKENS))
    terms = fused.evaluate(objective, batch, Head(eye, biases[0]), Head(eye, biases[1]), impl=impl, chunk_tokens=4)
    (gradient,) = torch.autograd.grad(terms.loss, hidden[0])
    return terms, gradient


OBJECTIVES = {
    **{name: (DivergenceTerm(name="d", divergence=divergence),) for name, divergence in NAMED.items()},
    "entropy": (EntropyTerm(name="e", selection=TopEntropy(1.0)),),
    "to the teacher's entropy": (EntropyTerm(name="e", target="teacher"),),
    "gated": (DivergenceTerm(name="d", divergence=NAMED["skew_forward_kl"], gate=EntropyGapGate()),),
    "ranking": (RankingTerm(name="r", num_candidates=6),),
    "sampled": (SampledTerm(name="s", function=lambda log_p, rows: -log_p),),
}


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize("which", ["neither", "teacher", "student", "both"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_every_engine_gives_float64s_value_and_gradient(impl, which, scale):
    """In float32, against the readable engine in float64 on the same logits."""
    student, teacher = masked(which, scale, torch.float32)
    for name, terms in OBJECTIVES.items():
        objective = Objective(terms)
        exact, wanted = evaluated(objective, student.double(), teacher.double(), "reference", torch.float64)
        ours, gradient = evaluated(objective, student, teacher, impl, torch.float32)
        assert not ours.loss.isnan() and not ours.student_entropy.isnan().any(), name
        if exact.loss.isinf():
            assert ours.loss.isinf(), name
            continue
        # A rounding of the largest logit (scale · 4 · 6e-8) in every log-probability, and sums of a few dozen of them.
        tolerance = dict(rtol=1e-4, atol=2e-5 * scale)
        torch.testing.assert_close(ours.loss.double(), exact.loss, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        near = dict(rtol=1e-3, atol=1e-5 * max(1.0, scale / 10))
        torch.testing.assert_close(gradient.double(), wanted, msg=lambda m, name=name: f"{name}: {m}", **near)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
def test_a_written_token_that_is_impossible_is_minus_infinity(impl):
    student, _ = masked("student")
    hidden = student.detach().masked_fill(student.detach().isinf(), 0.0).requires_grad_()
    batch = TokenBatch(hidden, None, (TOKENS,), token_ids=torch.full((TOKENS,), VOCAB - 1))
    bias = torch.where(student[0].detach().isinf(), -math.inf, 0.0).double()
    objective = Objective((SampledTerm(name="s", function=lambda log_p, rows: -log_p),))
    terms = fused.evaluate(objective, batch, Head(torch.eye(VOCAB, dtype=torch.float64), bias), None, impl=impl)
    assert terms.loss.isinf()


def test_candidates_that_are_impossible_rank_last_for_nothing_and_first_at_any_price():
    inf = math.inf
    scores = torch.tensor([[2.0, 1.0, -inf, -inf], [2.0, -inf, 1.0, 0.0], [-inf, -inf, -inf, -inf]], requires_grad=True)
    nll = plackett_luce_nll(scores)
    assert nll[0].item() == pytest.approx(math.log(1 + math.exp(-1))) and nll[1] == inf and nll[2] == 0
    (gradient,) = torch.autograd.grad(nll[[0, 2]].sum(), scores)
    assert gradient.isfinite().all() and (gradient[2] == 0).all()


def test_the_entropy_of_a_masked_distribution_is_that_of_what_is_left():
    logits = torch.randn(3, 8, dtype=torch.float64)
    logits[:, 5:] = -math.inf
    logits.requires_grad_()
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy, token_entropy(logits[:, :5]))
    assert torch.autograd.grad(entropy.sum(), logits)[0].isfinite().all()

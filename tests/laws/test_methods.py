"""Each rival's loss and gradient against its oracle, the laws between methods, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import oracles
import oracles_open as open_oracles
import oracles_rivals as rivals
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd import TSDKD, Head, TokenBatch, methods, tsd_kd_loss
from tsdkd.methods import (
    AKL,
    GKD,
    METHODS,
    TAID,
    DistiLLM,
    MiniLLM,
    SeqKD,
    SpeculativeKD,
    Summary,
    SupervisedKD,
    resolve_method,
)
from tsdkd.methods.akl import adaptive_kl
from tsdkd.selection import DivergenceAwareGate, EntropyOrDivergence, RandomTokens
from tsdkd.types import Counts, TokenStatistics

EXACT = dict(rtol=1e-9, atol=1e-9)
LENGTHS = (4, 0, 1, 3)
VOCAB, TEACHER_VOCAB = 7, 9


def case():
    """Logits as hidden states of an identity head, so that an oracle on logits has the same gradient."""
    tokens = sum(LENGTHS)
    student = (2 * torch.randn(tokens, VOCAB, dtype=torch.float64)).requires_grad_()
    teacher = 2 * torch.randn(tokens, TEACHER_VOCAB, dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (tokens,))
    recorded = {name: -3 * torch.rand(tokens, dtype=torch.float64) for name in ("student", "teacher", "mixture")}
    batch = TokenBatch(student, teacher, LENGTHS, token_ids=ids, rows=(3, 9, 4, 5), recorded=recorded)
    return batch, Head(torch.eye(VOCAB, dtype=torch.float64)), Head(torch.eye(TEACHER_VOCAB, dtype=torch.float64))


def responses(flat, batch):
    """The oracle's nested lists, from the student's flat numbers."""
    rows, start = [], 0
    for length in batch.lengths:
        places = range(start, start + length)
        rows.append([(flat[t * VOCAB : (t + 1) * VOCAB], batch.teacher_hidden[t].tolist()) for t in places])
        start += length
    return rows


def nested(values):
    return [part.tolist() for part in values.split(list(LENGTHS))]


def check(method, oracle, impl, batch, heads):
    flat = batch.student_hidden.detach().flatten().tolist()
    terms = method.loss(batch, *heads, impl=impl)
    assert terms.loss.item() == pytest.approx(oracle(flat), rel=1e-9, abs=1e-9)
    (gradient,) = torch.autograd.grad(terms.loss, batch.student_hidden)
    expected = torch.tensor(oracles.gradient(oracle, flat), dtype=torch.float64).reshape(gradient.shape)
    torch.testing.assert_close(gradient, expected, **EXACT)
    return terms


DIRECT = {
    "gkd": (GKD(beta=0.3), "generalized_jsd", 0.3),
    "gkd, forward": (GKD(beta=0.0), "forward_kl", None),
    "gkd, reverse, tempered": (GKD(beta=1.0, kd_temperature=1.7), "reverse_kl", None),
    "supervised_kd": (SupervisedKD(), "forward_kl", None),
    "distillm": (DistiLLM(), "skew_reverse_kl", 0.1),
    "distillm, forward": (DistiLLM(divergence="skew_forward_kl", alpha=0.3), "skew_forward_kl", 0.3),
    "speculative_kd": (SpeculativeKD(), "generalized_jsd", 0.5),
    "speculative_kd, reverse": (SpeculativeKD(divergence="reverse_kl"), "reverse_kl", None),
}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", DIRECT)
def test_the_divergence_methods_equal_their_oracles(name, impl):
    method, divergence, parameter = DIRECT[name]
    batch, *heads = case()
    tau = method.kd_temperature
    check(method, lambda x: rivals.direct_term(responses(x, batch), divergence, parameter, tau), impl, batch, heads)


def masks_of(name, share, x, batch, beta):
    made = []
    for response in responses(x, batch):
        entropies = [oracles.entropy(s) for s, _ in response]
        divergences = [rivals.divergence("generalized_jsd", beta, s, t[:VOCAB]).real for s, t in response]
        if name == "prefix":
            made.append(rivals.select_prefix(len(response), share))
        elif name == "opener":
            made.append(rivals.select_opener(entropies, share))
        elif name == "top_entropy":
            made.append(rivals.select_top_entropy(entropies, share))
        else:
            made.append(rivals.select_entropy_or_divergence(entropies, divergences, share / 2, share / 2))
    return made


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("gate", ["none", "entropy_gap", "divergence_aware"])
@pytest.mark.parametrize("name", ["prefix", "opener", "top_entropy", "entropy_or_divergence"])
def test_selected_and_gated_direct_terms_equal_the_oracle(name, gate, impl):
    batch, *heads = case()

    def gates(x):
        made = []
        for response in responses(x, batch):
            weights = [oracles.gate(s, t[:VOCAB]) for s, t in response]
            if gate == "divergence_aware":
                d = [rivals.divergence("generalized_jsd", 0.4, s, t[:VOCAB]).real for s, t in response]
                weights = [rivals.divergence_aware_gate(w, v) for w, v in zip(weights, d, strict=True)]
            made.append(weights if gate != "none" else [1.0] * len(response))
        return made

    def oracle(x):
        masks = masks_of(name, 0.6, x, batch, 0.4)
        per_response = name == "opener"
        options = dict(masks=masks, gates=gates(x), per_response=per_response)
        return rivals.direct_term(responses(x, batch), "generalized_jsd", 0.4, **options)

    terms = check(GKD(beta=0.4, selection=name, selection_share=0.6, gate=gate), oracle, impl, batch, heads)
    flat = batch.student_hidden.detach().flatten().tolist()
    expected = [flag for row in masks_of(name, 0.6, flat, batch, 0.4) for flag in row]
    assert terms.weights.selected[terms.mask].tolist() == expected


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_seq_kd_equals_the_oracle(impl):
    batch, *heads = case()
    ids = nested(batch.token_ids)
    check(SeqKD(kd_temperature=1.3), lambda x: rivals.cross_entropy_term(responses(x, batch), ids, 1.3), impl, batch, heads)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("clip", [0.2, 0.0, 1.0])
def test_minillm_equals_the_oracle(impl, normalise, clip):
    batch, *heads = case()
    # Near the recorded policy, and far from it: inside and outside of the clipping.
    current = batch.student_hidden.detach().log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
    recorded = {**batch.recorded, "student": current + torch.tensor([0.01, 0.1, -0.1, 0.5, -0.5, 1.0, -1.0, 0.02])}
    batch = dataclasses.replace(batch, recorded=recorded)
    rows = [
        list(zip(*columns, strict=True))
        for columns in zip(*(nested(recorded[n]) for n in ("student", "teacher", "mixture")), strict=True)
    ]
    ids, options = nested(batch.token_ids), dict(clip=clip, length_normalisation=normalise)
    check(MiniLLM(**options), lambda x: rivals.minillm(responses(x, batch), ids, rows, **options), impl, batch, heads)


def test_minillms_gradient_is_that_of_the_sequences_reverse_kl():
    """Three tokens, two steps, on-policy: the expectation over all answers, by enumeration, is exact."""
    prefixes = [(), (0,), (1,), (2,)]
    student = {p: torch.randn(3, dtype=torch.float64).tolist() for p in prefixes}
    teacher = {p: torch.randn(3, dtype=torch.float64).tolist() for p in prefixes}
    exact = torch.tensor(rivals.exact_sequence_reverse_kl_gradient(student, teacher), dtype=torch.float64)

    def estimated(alpha):
        """Σ over answers of their probability under the mixture times our gradient, in the oracle's order."""
        total = torch.zeros(4, 3, dtype=torch.float64)
        for first in range(3):
            for second in range(3):
                places, ids = [0, prefixes.index((first,))], torch.tensor([first, second])
                z_s = torch.tensor([student[prefixes[p]] for p in places], dtype=torch.float64, requires_grad=True)
                z_t = torch.tensor([teacher[prefixes[p]] for p in places], dtype=torch.float64)
                log_s, log_t = (z.detach().log_softmax(-1).gather(1, ids[:, None])[:, 0] for z in (z_s, z_t))
                mixture = (alpha * log_t.exp() + (1 - alpha) * log_s.exp()).log()
                recorded = {"student": log_s, "teacher": log_t, "mixture": mixture}
                batch = TokenBatch(z_s, z_t, (2,), token_ids=ids, recorded=recorded)
                eye = Head(torch.eye(3, dtype=torch.float64))
                loss = MiniLLM(alpha=alpha).loss(batch, eye, eye, counts=Counts(1, 0, 1)).loss
                (gradient,) = torch.autograd.grad(loss, z_s)
                for place, row in zip(places, gradient, strict=True):
                    total[place] += mixture.sum().exp() * row
        return total.flatten()

    torch.testing.assert_close(estimated(0.0), exact, **EXACT)
    expected = torch.tensor(rivals.expected_minillm_gradient(student, teacher, 0.2, 2), dtype=torch.float64)
    torch.testing.assert_close(estimated(0.2), expected, **EXACT)
    assert (expected - exact).abs().max() > 1e-3  # one step of importance is an approximation, and known as one


# ---------------------------------------------------------------------- laws


def loss_of(method, batch, heads):
    loss = method.loss(batch, *heads).loss
    return loss.detach(), torch.autograd.grad(loss, batch.student_hidden)[0]


@pytest.mark.parametrize(
    "one,other",
    [
        (GKD(beta=0.0), SupervisedKD()),
        (DistiLLM(divergence="skew_forward_kl", alpha=0.0), SupervisedKD()),
        (DistiLLM(alpha=0.0), GKD(beta=1.0)),
        (TSDKD(gate="none", indirect_weight=0.0, entropy_weight=0.0), GKD()),
        (TSDKD(indirect_weight=0.0, entropy_weight=0.0), GKD(gate="entropy_gap")),
        (SpeculativeKD(beta=0.9), GKD()),
        (GKD(selection="random", selection_share=1.0), GKD()),
        (GKD(selection="prefix", selection_share=1.0), GKD(selection="entropy_or_divergence", selection_share=1.0)),
        (MiniLLM(sampled_weight=0.0), GKD(beta=1.0)),
    ],
)
def test_ends_agree(one, other):
    batch, *heads = case()
    for a, b in zip(loss_of(one, batch, heads), loss_of(other, batch, heads), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_options_beyond_the_paper_equal_the_oracle():
    student = torch.randn(2, 5, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(2, 5, VOCAB, dtype=torch.float64)
    options = dict(ranking_stage_weights="teacher_mass", entropy_target="teacher", num_candidates=4)
    shares = dict(opener_entropy_share=0.5, top_entropy_fraction=0.7)

    def oracle(x):
        token = lambda r, t: (x[(5 * r + t) * VOCAB : (5 * r + t + 1) * VOCAB], teacher[r, t].tolist())  # noqa: E731
        named = {"stage_weights": "teacher_mass", "entropy_target": "teacher", "num_candidates": 4, **shares}
        return oracles.tsd_kd([[token(r, t) for t in range(5)] for r in range(2)], **named)["loss"]

    terms = tsd_kd_loss(student, teacher, torch.ones(2, 5), **options, **shares)
    flat = student.detach().flatten().tolist()
    assert terms.loss.item() == pytest.approx(oracle(flat), rel=1e-9)
    terms.loss.backward()
    expected = torch.tensor(oracles.gradient(oracle, flat), dtype=torch.float64)
    torch.testing.assert_close(student.grad.flatten(), expected, **EXACT)
    paper = tsd_kd_loss(student, teacher, torch.ones(2, 5), num_candidates=4, **shares)
    assert paper.loss.item() != pytest.approx(terms.loss.item(), rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented_and_has_its_parts(name):
    page = (Path(methods.__file__).parent / "README.md").read_text()
    method = METHODS[name](**({"num_candidates": 4} if name == "tsd_kd" else {}))
    assert isinstance(method, methods.Method) and method.name == name and hash(method) is not None
    assert method.paper["id"] in page and f"`{name}.py`" in page
    assert {"title", "id", "citation"} == set(method.paper)
    batch, *heads = case()
    whole = method.loss(batch, *heads).loss.detach()
    parts = [method.only(term).loss(batch, *heads).loss.detach() for term in method.terms()]
    torch.testing.assert_close(sum(parts), whole)
    counts = method.counts(LENGTHS)
    assert counts.tokens == 8 and counts.responses == 3
    torch.testing.assert_close(method.loss(batch, *heads, counts=counts).loss.detach(), whole)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "cls,options,message",
    [
        (GKD, {"lmbda": 1.5}, "lmbda=1.5: a share lies in"),
        (GKD, {"beta": -0.1}, "beta=-0.1"),
        (GKD, {"selection": "half"}, "selection='half' is unknown; choose one of: entropy_or_divergence, none, opener, prefix"),
        (GKD, {"selection": "random", "selection_share": 2}, "selection_share=2"),
        (GKD, {"gate": "gap"}, "choose one of: divergence_aware, entropy_gap, none"),
        (DistiLLM, {"divergence": "reverse_kl"}, "choose one of: skew_forward_kl, skew_reverse_kl"),
        (DistiLLM, {"schedule": "linear"}, "choose one of: constant, decreasing, increasing"),
        (DistiLLM, {"replay_capacity": 0}, "replay_capacity=0"),
        (MiniLLM, {"alpha": 2.0}, "alpha=2.0"),
        (MiniLLM, {"clip": -1}, "clip=-1"),
        (SpeculativeKD, {"top_k": -1}, "top_k=-1"),
        (SpeculativeKD, {"divergence": "skew"}, "choose one of: forward_kl, generalized_jsd, reverse_kl"),
        (SeqKD, {"kd_temperature": 0}, "kd_temperature=0"),
        (TSDKD, {"lmbda": 2}, "lmbda=2"),
        (TSDKD, {"ranking_stage_weights": "mass"}, "choose one of: teacher_mass, uniform"),
        (TSDKD, {"entropy_target": "student"}, "choose one of: teacher, zero"),
        (EntropyOrDivergence, {"entropy_share": 2.0}, "entropy_share=2.0"),
        (DivergenceAwareGate, {"sharpness": 0.0}, "gate_sharpness=0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_an_unknown_method_or_option_is_refused_by_name():
    with pytest.raises(ValueError, match="method='gdk' is unknown; choose one of: akl, distillm, gkd, gold, minillm"):
        resolve_method("gdk")
    with pytest.raises(ValueError, match="method 'seq_kd' has no option 'beta'; it has: kd_temperature"):
        resolve_method("seq_kd", {"beta": 0.5})
    assert resolve_method("gkd", {"lmbda": 0.5}) == GKD(lmbda=0.5)


def test_a_random_selection_depends_on_seed_and_row_alone():
    def chosen(rows, longest, seed=0):
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        mask[:, :20] = True
        return RandomTokens(0.3, seed)(TokenStatistics(mask, torch.zeros(mask.shape), rows=rows))[:, :20]

    both = chosen((5, 11), 20)
    assert both.sum(-1).tolist() == [6, 6] and not torch.equal(both[0], both[1])
    assert torch.equal(chosen((11,), 64)[0], both[1]) and torch.equal(chosen((5,), 37)[0], both[0])
    assert not torch.equal(chosen((5, 11), 20, seed=1), both)
    shares = torch.stack([chosen((row,), 20)[0] for row in range(2000)]).float().mean(0)
    assert (shares - 0.3).abs().max() < 0.05  # five standard deviations of a share of 0.3 over 2000 rows


# ---------------------------------------------------------------------- methods that came after: adaptive KL, interpolation


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("tau,mass", [(1.0, 0.5), (1.7, 0.8), (0.6, 1.0)])
def test_akl_equals_its_oracle(impl, tau, mass):
    batch, *heads = case()

    def oracle(x):
        tokens = [token for response in responses(x, batch) for token in response]
        return sum(open_oracles.akl(s, t[:VOCAB], tau, mass) for s, t in tokens) / len(tokens)

    for row in batch.teacher_hidden:  # the head is decided by no rounding
        assert mass == 1.0 or open_oracles.akl_head_margin(row[:VOCAB].tolist(), tau, mass) > 1e-9
    check(AKL(head_mass=mass, kd_temperature=tau), oracle, impl, batch, heads)


def test_akl_at_equal_models_is_zero_with_a_gradient_of_zero():
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    value = adaptive_kl(logits, logits.detach())
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-15 and gradient.abs().max() < 1e-15


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_taid_equals_its_oracle(impl, share):
    batch, *heads = case()

    def oracle(x):
        tokens = [token for response in responses(x, batch) for token in response]
        return sum(open_oracles.taid(s, t[:VOCAB], share, 1.3) for s, t in tokens) / len(tokens)

    check(TAID(start_share=share, kd_temperature=1.3), oracle, impl, batch, heads)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=30), st.integers(1, 40), st.sampled_from([5e-4, 0.2]))
def test_taids_share_follows_the_oracle(losses, steps, step_size):
    state = TAID(step_size=step_size).start(steps)
    shares = [state.share]
    for step, loss in enumerate(losses, 1):
        state.after_step(Summary(step, loss, {"direct": loss}))
        shares.append(state.share)
        other = TAID(step_size=step_size).start(steps)  # a checkpoint after every step changes nothing
        other.load_state_dict(json.loads(json.dumps(state.state_dict())))
        state = other
    assert shares == pytest.approx(open_oracles.taid_shares(losses, steps, alpha=step_size), abs=1e-12)

"""What rules, terms and counts say of themselves must agree with what they do, in every engine."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from fused_cases import ENGINES, EXACT, LENGTHS, case, gradients

from tsdkd import Counts, fused, tsd_kd_loss
from tsdkd.losses import DIVERGENCES, resolve_divergence
from tsdkd.methods import GKD, TAID, Method, State, Summary, resolve_method
from tsdkd.selection import SELECTIONS, TopEntropy
from tsdkd.types import DivergenceTerm, EntropyTerm, Objective, ReadPlan

ENGINE = ["reference", *ENGINES]


def rule(function, **says):
    """A rule with what it says of itself."""

    def wrapped(statistics):
        return function(statistics)

    for name, value in says.items():
        setattr(wrapped, name, value)
    return wrapped


def on_logits(method, batch, student, teacher):
    """The same loss on full logits, by the public function."""
    mask = batch.mask()
    spread = lambda z: z.new_zeros(*mask.shape, z.shape[-1]).masked_scatter(mask.unsqueeze(-1), z)  # noqa: E731
    both = spread(student.logits(batch.student_hidden)), spread(teacher.logits(batch.teacher_hidden))
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(GKD) if f.name not in ("lmbda", "kd_temperature")}
    return tsd_kd_loss(*both, mask, indirect_weight=0.0, entropy_weight=0.0, **options)


def place(statistics):
    """Where in its completion a token stands, from 0 to 1."""
    mask = statistics.mask
    return mask.cumsum(-1) / mask.sum(-1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("impl", ENGINE)
@pytest.mark.parametrize(
    "method",
    [
        GKD(selection=rule(lambda s: s.teacher_entropy > 1.5, needs="token")),
        GKD(selection=rule(lambda s: s.divergence > 0.4, needs="token"), gate="entropy_gap"),
        *(
            GKD(selection=name, selection_share=0.4, gate=rule(place, needs="lengths"))
            for name in SELECTIONS
            if name != "random"
        ),
    ],
)
def test_a_rule_sees_the_whole_completion_in_every_engine(impl, method):
    """A selection that reads its own token alone, and a gate that reads where in the completion a token stands."""
    batch, student, teacher = case(30, 30)
    batch = dataclasses.replace(batch, rows=None)
    expected = on_logits(method, batch, student, teacher)
    ours = method.loss(batch, student, teacher, impl=impl, chunk_tokens=3)
    torch.testing.assert_close(ours.loss.detach(), expected.loss.detach(), **EXACT)
    for a, b in zip(gradients(ours.loss, batch, student), gradients(expected.loss, batch, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert method.reads(LENGTHS).is_cut is (method.selection == "prefix" and method.gate == "none")


@pytest.mark.parametrize("impl", ENGINE)
@pytest.mark.parametrize("needs", ["lengths", "student"])
@pytest.mark.parametrize("count", [lambda n: min(n, 3), lambda n: 1])
def test_a_count_that_is_not_what_is_kept_is_refused(impl, needs, count):
    batch, student, teacher = case(30, 30)
    two = rule(lambda s: s.mask & (s.mask.cumsum(-1) <= 2), needs=needs, count=count)
    with pytest.raises(ValueError, match=r"keeps 2 tokens of a completion of 6, but its count\(6\) is [13], which the term"):
        GKD(selection=two).loss(batch, student, teacher, impl=impl)


def test_what_a_rule_may_say():
    with pytest.raises(ValueError, match="has a prefix_length, by which completions are cut"):
        GKD(selection=rule(lambda s: s.mask, needs="lengths", prefix_length=lambda n: 1))

    class Top(collections.namedtuple("Top", "share")):
        """A tuple has a count of its own, which is no rule's."""

        def __call__(self, statistics):
            return TopEntropy(self.share)(statistics)

    batch, student, teacher = case(30, 30)
    term = EntropyTerm(name="e", selection=Top(0.5))
    assert term.per_completion and term.divisor(LENGTHS) == 3
    assert fused.evaluate(Objective((term,)), batch, student, teacher).loss.isfinite()
    with_one_too_many = EntropyTerm(name="e", selection=rule(lambda s: s.mask, count=lambda n: max(n, 1)))
    assert with_one_too_many.divisor(LENGTHS) == 10  # an empty completion counts nothing


@pytest.mark.parametrize("impl", ENGINE)
def test_a_cut_leaves_selections_that_did_not_cut(impl):
    batch, student, teacher = case(30, 30)
    cut = dataclasses.replace(batch, plan=ReadPlan((9, 1, 0, 3), LENGTHS, LENGTHS))
    objective = GKD(selection="top_entropy", selection_share=0.5).objective()
    ours = fused.evaluate(objective, cut, student, teacher, impl=impl)
    assert ours.selected_mask.sum(-1).tolist() == [3, 1, 0, 2]
    assert fused.evaluate(GKD(selection="prefix").objective(), cut, student, teacher, impl=impl).selected_mask.sum() == 10


def test_terms_take_functions_and_refuse_what_is_none():
    function = DIVERGENCES["reverse_kl"]
    batch, student, teacher = case(30, 30)
    given = fused.evaluate(Objective((DivergenceTerm(name="d", divergence=function),)), batch, student, teacher).loss
    named = Objective((DivergenceTerm(name="d", divergence=resolve_divergence("reverse_kl")),))
    torch.testing.assert_close(given.detach(), fused.evaluate(named, batch, student, teacher).loss.detach())
    with pytest.raises(ValueError, match=r"has divergence='reverse_kl': pass losses\.resolve_divergence"):
        DivergenceTerm(name="d", divergence="reverse_kl")
    for weight in (float("nan"), "1", True):
        with pytest.raises(ValueError, match="the term e has weight="):
            EntropyTerm(name="e", weight=weight)


def test_counts_by_hand_divide_what_they_are_of():
    batch, student, teacher = case(30, 30)
    every = Objective((EntropyTerm(name="e"),))
    alone = fused.evaluate(every, batch, student, teacher).loss.detach()
    torch.testing.assert_close(fused.evaluate(every, batch, student, teacher, counts=Counts(10, 0, 3)).loss.detach(), alone)
    two = Objective(
        tuple(
            DivergenceTerm(name=name, divergence=DIVERGENCES[name], selection=SELECTIONS["prefix"](share))
            for name, share in (("forward_kl", 0.3), ("reverse_kl", 0.6))
        )
    )
    with pytest.raises(ValueError, match="counts say one number of the tokens that the terms forward_kl, reverse_kl select"):
        fused.evaluate(two, batch, student, teacher, counts=Counts(10, 0, 3, 4))
    whole = fused.evaluate(two, batch, student, teacher, counts=two.counts(LENGTHS)).loss.detach()
    torch.testing.assert_close(whole, fused.evaluate(two, batch, student, teacher).loss.detach())


def test_a_divergence_that_spoils_the_teacher_is_refused():
    def spoiling(student, teacher):
        return (student - teacher.mul_(0.5)).square().mean(-1)

    batch, student, teacher = case(30, 30)
    with pytest.raises(ValueError, match="changed the teacher's logits in place, which others read after it"):
        GKD(divergence=spoiling).loss(batch, student, teacher)


def test_two_rows_are_looked_at_in_inference_mode_too():
    batch, student, teacher = case(30, 30)

    def squared(s, t):
        return (s - t).square().mean(-1)

    expected = GKD(divergence=squared).loss(batch, student, teacher).loss.detach()

    def fresh(s, t):
        return squared(s, t)

    with torch.inference_mode():
        torch.testing.assert_close(GKD(divergence=fresh).loss(batch, student, teacher).loss, expected)


def test_a_registered_divergence_has_a_default_of_its_own(monkeypatch):
    def renyi(student, teacher, alpha=1.5):
        return (student.softmax(-1).pow(alpha) * teacher.softmax(-1).pow(1 - alpha)).sum(-1).log() / (alpha - 1)

    def without(student, teacher, beta):
        return (student - teacher).square().mean(-1) * beta

    monkeypatch.setitem(DIVERGENCES, "renyi", renyi)
    monkeypatch.setitem(DIVERGENCES, "without", without)
    assert GKD(divergence="renyi").divergence_of().parameter == 1.5
    with pytest.raises(ValueError, match="divergence='without' has no default for beta"):
        resolve_divergence("without")
    monkeypatch.setitem(DIVERGENCES, "scalar", lambda s, t: (s - t).sum())
    with pytest.raises(ValueError, match=r"gave shape \[\]"):
        tsd_kd_loss(torch.randn(1, 2, 12), torch.randn(1, 2, 12), torch.ones(1, 2), divergence="scalar")


def test_a_state_moves_weights_and_selections_and_counts_follow():
    @dataclasses.dataclass(frozen=True)
    class Warming(Method):
        name = "warming"

        def objective(self, batch=None, state=None):
            share = 0.2 if state is None else state.share
            weight = 0.0 if state is None else 1.0
            term = EntropyTerm(name="e", weight=weight, selection=TopEntropy(share))
            return Objective((DivergenceTerm(name="d", divergence=DIVERGENCES["forward_kl"]), term))

    class Half(State):
        share = 0.5

    method, state = Warming(), Half()
    assert method.terms() == {"d": 1.0, "e": 0.0} and method.terms(state) == {"d": 1.0, "e": 1.0}
    assert "e" not in method.counts(LENGTHS).divisors and method.counts(LENGTHS, state).divisors["e"] == 6
    batch, student, teacher = case(30, 30)
    counted = method.loss(batch, student, teacher, state=state, counts=method.counts(LENGTHS, state)).loss.detach()
    torch.testing.assert_close(counted, method.loss(batch, student, teacher, state=state).loss.detach())


def test_methods_are_objects_with_a_name():
    class Nameless(GKD):
        name = ""

    with pytest.raises(ValueError, match=r"method=GKD is a class: pass an object of it, GKD\(…\)"):
        resolve_method(GKD)
    with pytest.raises(ValueError, match="the method Nameless has no name: set one on its class"):
        resolve_method(Nameless())


def test_taids_share_survives_a_loss_of_nothing():
    state = TAID(start_share=0.0).start(4)
    for step, loss in enumerate((0.0, 5.0, 1e-30, 3.0), 1):
        state.after_step(Summary(step, loss, {"direct": loss}))
    assert state.share == 1.0

"""What any paper may bring: divergences, rules, terms and methods of a user's own keep the laws of the named ones."""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
import torch
from fused_cases import ENGINES, EXACT, LENGTHS, case, gradients

from tsdkd import TSDKD, Counts, fused, fused_tsd_kd_loss, tsd_kd_loss
from tsdkd.fused import reads
from tsdkd.losses import DIVERGENCES, generalized_jsd, resolve_divergence
from tsdkd.methods import GKD, METHODS, DivergenceMethod, Method, State
from tsdkd.selection import AdaptiveOpener, TopEntropy
from tsdkd.types import DivergenceTerm, EntropyTerm, Objective, RankingTerm, Rule, SampledTerm, TokenStatistics


def total_variation(student, teacher):
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2


def squared_error(student, teacher):
    """Of the logits themselves: no divergence of distributions, so a constant added to the logits counts."""
    return (student - teacher).square().mean(-1)


OWN = {"total_variation": total_variation, "squared_error": squared_error}


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize("name", [*DIVERGENCES, *OWN])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_divergence_is_its_function_in_every_engine(impl, name, temperature):
    """The mean over tokens of the function on logits divided by τ, and autograd's gradient of it."""
    batch, student, teacher = case(30, 30)
    divergence = resolve_divergence(OWN.get(name, name))
    objective = Objective((DivergenceTerm(name="mine", divergence=divergence),), temperature)
    expected = divergence(
        student.logits(batch.student_hidden) / temperature, teacher.logits(batch.teacher_hidden) / temperature
    ).mean()
    ours = fused.evaluate(objective, batch, student, teacher, impl=impl, chunk_tokens=3)
    torch.testing.assert_close(ours.loss.detach(), expected.detach(), **EXACT)
    for a, b in zip(gradients(ours.loss, batch, student), gradients(expected, batch, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
def test_a_divergence_of_ones_own_goes_wherever_a_name_goes(impl, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "total_variation", total_variation)
    student, teacher, mask = torch.randn(2, 4, 12, requires_grad=True), torch.randn(2, 4, 12), torch.ones(2, 4)
    named, given = (tsd_kd_loss(student, teacher, mask, divergence=d) for d in ("total_variation", total_variation))
    assert named.loss.item() == given.loss.item()
    torch.testing.assert_close(given.divergence, total_variation(student, teacher).detach())
    hidden, weight = torch.randn(2, 4, 5), torch.randn(12, 5)
    fused_terms = fused_tsd_kd_loss(hidden, weight, hidden.flip(-1), weight, mask, divergence=total_variation, impl=impl)
    logits = hidden @ weight.T, hidden.flip(-1) @ weight.T
    torch.testing.assert_close(fused_terms.loss.detach(), tsd_kd_loss(*logits, mask, divergence=total_variation).loss)
    for method in (GKD, TSDKD):
        assert method(divergence="total_variation").objective().divergence.function is total_variation
        assert method(divergence=total_variation) == method(divergence=total_variation)


def test_beta_is_read_by_the_named_divergence_that_has_one():
    student, teacher, mask = torch.randn(2, 4, 12), torch.randn(2, 4, 12), torch.ones(2, 4)
    loss = lambda **options: tsd_kd_loss(student, teacher, mask, **options).loss.item()  # noqa: E731
    assert loss(beta=0.3) != loss(beta=0.9)
    assert loss(divergence="reverse_kl", beta=0.3) == loss(divergence="reverse_kl", beta=0.9)
    assert loss(divergence=generalized_jsd, beta=0.3) == loss(beta=0.9)  # its own default
    bound = functools.partial(generalized_jsd, beta=0.3)
    assert loss(divergence=bound) == pytest.approx(loss(beta=0.3), rel=1e-6)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ("total", "divergence='total' is unknown; choose one of: forward_kl"),
        (3, "divergence=3: a divergence is a name"),
        (lambda student: student.sum(-1), "cannot be called with two tensors"),
        (lambda student, teacher, other: other, "cannot be called with two tensors"),
    ],
)
def test_what_is_no_divergence_is_refused_at_construction(wrong, message):
    for build in (lambda: GKD(divergence=wrong), lambda: TSDKD(divergence=wrong)):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda s, t: (s - t).square().mean(), r"gave shape \[\]: a divergence gives one number a row"),
        (lambda s, t: s - t, r"gave shape \[2, 30\]"),
        (lambda s, t: [0.0, 0.0], "gave a list"),
        (lambda s, t: total_variation(s.detach(), t), "has no gradient"),
        (lambda s, t: total_variation(s, t) / 0.0, r"gave \[inf, inf\]: it must be finite"),
        (lambda s, t: torch.where(s > 99, s.log(), 0.0).sum(-1) + total_variation(s, t), "has a NaN or Inf as the gradient"),
        (lambda s, t: s @ t, "failed \\(RuntimeError"),
    ],
)
def test_two_rows_show_what_is_no_divergence(impl, wrong, message):
    batch, student, teacher = case(30, 30)
    with pytest.raises(ValueError, match=f"on two rows of 30 logits {message}"):
        GKD(divergence=wrong).loss(batch, student, teacher, impl=impl)
    with pytest.raises(ValueError, match=message.replace("30", "12")):
        tsd_kd_loss(torch.randn(1, 2, 12), torch.randn(1, 2, 12), torch.ones(1, 2), divergence=wrong)


@pytest.mark.parametrize("impl", ENGINES)
def test_a_divergence_without_a_kernel_says_once_that_torch_sweeps(impl, caplog):
    def of_no_other_test(student, teacher):  # once in a process
        return squared_error(student, teacher)

    batch, student, teacher = case(30, 30)
    with caplog.at_level(logging.WARNING, logger="tsdkd.fused.tiles_triton"):
        for _ in range(2):
            GKD(divergence=of_no_other_test).loss(batch, student, teacher, impl=impl)
    assert caplog.text.count("of_no_other_test has no Triton kernel") == (impl == "triton")


# ---------------------------------------------------------------------- terms


@dataclasses.dataclass(frozen=True)
class Mine(Method):
    weight: float = 0.3
    name = "mine"

    def objective(self, batch=None, state=None):
        match = DivergenceTerm(name="reverse_kl", divergence=resolve_divergence("reverse_kl"))
        return Objective((match, EntropyTerm(name="sharpen", weight=self.weight, selection=TopEntropy(0.5))))


@pytest.mark.parametrize("impl", ["reference", *ENGINES])
def test_counts_sums_and_logged_names_follow_from_the_terms(impl):
    method, (batch, student, teacher) = Mine(), case(30, 30)
    assert method.terms() == {"reverse_kl": 1.0, "sharpen": 0.3}
    counts = method.counts(LENGTHS)
    assert counts.divisors == {"reverse_kl": 10, "sharpen": 6} and (counts.tokens, counts.selected, counts.responses) == (
        10,
        6,
        3,
    )
    found = method.loss(batch, student, teacher, impl=impl)
    assert {name for name in found.sums if name.startswith("loss/")} == {"loss/reverse_kl", "loss/sharpen"}
    total = sum(weight * found.terms[name].value.detach() for name, weight in method.terms().items())
    torch.testing.assert_close(found.loss.detach(), total)
    for name in method.terms():
        total, count = found.sums[f"loss/{name}"]
        torch.testing.assert_close(total / count, found.terms[name].value.detach())
    # The views that TSD-KD's users know go by kind, so that no name reads as zero.
    assert found.direct is found.terms["reverse_kl"].value and found.entropy is found.terms["sharpen"].value
    assert found.indirect == 0 and not found.opener_mask.any()
    parts = [method.only(name).loss(batch, student, teacher, impl=impl).loss.detach() for name in method.terms()]
    torch.testing.assert_close(sum(parts), found.loss.detach())


def test_a_second_term_of_a_kind_is_logged_beside_the_first():
    batch, student, teacher = case(30, 30)
    one, two = (DivergenceTerm(name=name, divergence=resolve_divergence(name)) for name in ("forward_kl", "reverse_kl"))
    sums = fused.evaluate(Objective((one, two)), batch, student, teacher).sums
    assert {"loss/forward_kl", "loss/reverse_kl", "gate/mean", "gate/mean/reverse_kl"} <= sums.keys()
    with pytest.raises(ValueError, match=r"two terms have one name \(a, a\)"):
        Objective((EntropyTerm(name="a"), EntropyTerm(name="a")))


def test_counts_that_say_nothing_of_a_term_are_refused_and_those_that_do_are_used():
    batch, student, _ = case(30, 30)
    term = SampledTerm(name="some", function=lambda log_p, rows: -log_p, selection=TopEntropy(0.5))
    with pytest.raises(ValueError, match="counts say nothing of the tokens that the some term selects"):
        fused.evaluate(Objective((term,)), batch, student, None, counts=Counts(10, 0, 3))
    whole = fused.evaluate(Objective((term,)), batch, student, None).loss
    doubled = fused.evaluate(Objective((term,)), batch, student, None, counts=Counts(10, divisors={"some": 12})).loss
    torch.testing.assert_close(doubled.detach() * 2, whole.detach())


def test_a_term_that_no_engine_knows_and_one_without_its_function_are_refused():
    from tsdkd.types import Term

    batch, student, teacher = case(30, 30)
    with pytest.raises(ValueError, match="the term odd is a Term, which no engine computes"):
        fused.evaluate(Objective((Term(name="odd"),)), batch, student, teacher)
    with pytest.raises(ValueError, match="the term empty has no function"):
        fused.evaluate(Objective((SampledTerm(name="empty"),)), batch, student, teacher)
    with pytest.raises(ValueError, match="num_candidates=31 but the shared vocabulary has 30"):
        fused.evaluate(Objective((RankingTerm(name="r", num_candidates=31),)), batch, student, teacher)


# ---------------------------------------------------------------------- rules and methods


def test_a_rule_says_once_what_it_reads_and_a_plain_selection_pays_aloud(caplog, monkeypatch):
    monkeypatch.setattr(reads, "_announced", set())
    batch, student, teacher = case(30, 30)

    def disagreements(statistics):
        return statistics.top1_agreement == 0

    with caplog.at_level(logging.INFO, logger="tsdkd.fused.reads"):
        for _ in range(2):
            GKD(selection=disagreements).loss(batch, student, teacher)
    assert (
        caplog.text.count("the selection disagreements reads other tokens (needs='both'): every step projects both heads") == 1
    )
    assert Rule.of(disagreements, "selection").reads == "both" and Rule.of(disagreements, "gate").reads == "token"
    assert Rule.of(TopEntropy(0.1), "selection").count(30) == 3 and Rule.of(None, "gate") is None
    disagreements.needs = "everything"
    with pytest.raises(ValueError, match="the selection disagreements has needs='everything'; choose one of: lengths"):
        GKD(selection=disagreements)
    with pytest.raises(ValueError, match="gave \\(3,\\) for statistics of shape"):
        GKD(gate=lambda s: torch.ones(3)).loss(batch, student, teacher)


def test_options_are_frozen_and_hashable_and_what_changes_is_in_the_state():
    for name, method in METHODS.items():
        options = {"adaptive_opener": True} if name == "tsd_kd" else {}
        one, other = method(**options), method(**options)
        assert one == other and hash(one) == hash(other)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.kd_temperature = 2.0
    opener = AdaptiveOpener(warmup=1)
    method = TSDKD(adaptive_opener=opener)
    first, second = method.start(10), method.start(10)
    statistics = TokenStatistics(torch.ones(1, 2).bool(), torch.ones(1, 2), torch.zeros(1, 2))
    first.history.append(first.observe(statistics).flatten().tolist())
    assert first.history.smoothed == [1.0] and second.history.smoothed == [] and method == TSDKD(adaptive_opener=opener)
    assert first.state_dict() != second.state_dict()


def test_a_method_of_ones_own_has_a_default_for_everything_but_its_objective():
    method = Mine()
    assert method.rollouts.share == 1.0 and method.reads_teacher and isinstance(method.start(None), State)
    assert method.reads((3, 4)).student == (3, 4) and method.pretraining_weight == 0.0
    with pytest.raises(TypeError, match="abstract"):
        Method()
    assert not [name for name in vars(DivergenceMethod) if name == "loss"]  # written once, in Method

"""Rules of a user's own, what the teacher did not read, and what the door refuses."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from fused_cases import (
    ENGINES,
    EXACT,
    LENGTHS,
    OBJECTIVES,
    TOKENS,
    case,
    direct,
    gradients,
    plan_of,
    sampled,
)

from tsdkd import TSDKD, fused, fused_tsd_kd_loss
from tsdkd.selection import SELECTIONS, EntropyGapGate, TopEntropy, direct_count
from tsdkd.types import Counts, EntropyTerm, Objective, RankingTerm


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
        ({"student_hidden": broken}, r"student_hidden holds a NaN or Inf at a trained token \(completion 1, token 2; 1 tokens"),
        ({"teacher_hidden": worse}, r"teacher_hidden holds a NaN or Inf at a trained token \(completion 0, token 1"),
        ({"student_hidden": hidden.to("meta")}, "student_hidden is on meta but teacher_hidden is on cpu"),
        ({"student_head": torch.randn(20, 4, device="meta")}, "the student's head is on meta"),
        ({"num_candidates": 21}, "num_candidates=21 but the shared vocabulary has 20"),
        ({"lmbda": 0.5}, "has no option 'lmbda'; it has: indirect_weight, .*, temperature, "),
        ({"temperature": -1.0}, "kd_temperature=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused_tsd_kd_loss(**{**arguments, **wrong})


def test_top_entropys_count_is_known_from_lengths():
    assert EntropyTerm(name="e", selection=TopEntropy(0.1)).kept((100, 5, 0)) == 11
    assert EntropyTerm(name="e", selection=lambda s: s.mask).kept((100,)) is None


@pytest.mark.parametrize("impl", ENGINES)
def test_a_gate_of_ones_own_gives_weights_of_0_or_more(impl):
    """At a token that the term takes; what stands off the mask is nobody's."""

    def gate(statistics):
        weights = torch.ones_like(statistics.student_entropy)
        weights[0, 2] = -0.5
        return weights

    torch.manual_seed(0)
    made = torch.randn(2, 4, 6), torch.randn(20, 6), torch.randn(2, 4, 6), torch.randn(20, 6)
    mask = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"the gate gate of the direct term gave -0.5 to token 2 of completion 0 \(1 of 8"):
        fused_tsd_kd_loss(*made, mask, gate=gate, impl=impl)
    mask[0, 2:] = 0
    assert fused_tsd_kd_loss(*made, mask, gate=gate, impl=impl).loss.isfinite()

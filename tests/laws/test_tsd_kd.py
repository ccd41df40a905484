"""The whole objective against the oracle, and the laws of a masked, counted loss."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd import TSDKD, Counts, Head, TokenBatch, fused, tsd_kd_loss
from tsdkd.methods import resolve_method
from tsdkd.selection import EntropyGapGate

EXACT = dict(rtol=1e-9, atol=1e-9)
LENGTHS = [6, 1, 0, 3]
OPTIONS = [
    {},
    {"gate": "none"},
    {"gate_sharpness": 3.0, "temperature": 1.7},
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 0.5, "num_candidates": 2, "opener_entropy_share": 0.6, "top_entropy_fraction": 0.4},
    {"opener_entropy_share": 0.0},
    {"opener_entropy_share": 1.0, "top_entropy_fraction": 1.0},
    {"top_entropy_fraction": 0.0},
    {"indirect_weight": 0.0, "entropy_weight": 0.0},
    {"direct_weight": 0.0, "indirect_weight": 2.0, "entropy_weight": 0.3},
]


def case(vocab=12, teacher_vocab=14, width=6, dtype=torch.float64, lengths=LENGTHS):
    student = (2 * torch.randn(len(lengths), width, vocab, dtype=torch.float64)).to(dtype)
    teacher = (2 * torch.randn(len(lengths), width, teacher_vocab, dtype=torch.float64)).to(dtype)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return student.requires_grad_(), teacher, mask


def oracle(student, teacher, mask, flat=None, **options):
    options = {("gate_on" if k == "gate" else k): (v != "none" if k == "gate" else v) for k, v in options.items()}
    values = iter(flat) if flat is not None else None
    vocab = student.shape[-1]
    responses = []
    for i in range(student.shape[0]):
        tokens = []
        for j in range(student.shape[1]):
            if mask[i, j]:
                logits = [next(values) for _ in range(vocab)] if values is not None else student[i, j].tolist()
                tokens.append((logits, teacher[i, j].tolist()))
        responses.append(tokens)
    return oracles.tsd_kd(responses, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_gradient_and_diagnostics_equal_the_oracle(options):
    student, teacher, mask = case()
    terms = tsd_kd_loss(student, teacher, mask, **options)
    expected = oracle(student, teacher, mask, **options)
    for name in ("loss", "indirect", "direct", "entropy"):
        torch.testing.assert_close(getattr(terms, name).item(), expected[name], **EXACT)
    terms.loss.backward()
    flat = student.detach()[mask].flatten().tolist()
    gradient = oracles.gradient(lambda x: oracle(student, teacher, mask, flat=x, **options)["loss"], flat)
    torch.testing.assert_close(student.grad[mask].flatten(), torch.tensor(gradient, dtype=torch.float64), **EXACT)
    assert (student.grad[~mask] == 0).all()
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(terms.student_entropy[i, :length].tolist(), expected["student_entropy"][i], **EXACT)
        if options.get("direct_weight") != 0.0:  # without the direct term nobody reads the teacher's distribution
            torch.testing.assert_close(terms.gate[i, :length].tolist(), expected["gate"][i], **EXACT)
            torch.testing.assert_close(terms.divergence[i, :length].tolist(), expected["divergence"][i], **EXACT)
            torch.testing.assert_close(terms.teacher_entropy[i, :length].tolist(), expected["teacher_entropy"][i], **EXACT)
        else:
            assert terms.teacher_entropy is None and terms.divergence is None and not terms.weights.selected.any()
        if options.get("indirect_weight") != 0.0:  # a term of weight 0 selects nothing here
            assert terms.opener_mask[i, :length].tolist() == expected["opener"][i]
            assert terms.top_entropy_mask[i, :length].tolist() == expected["top_entropy"][i]


def test_terms_carry_gradients_of_their_own():
    student, teacher, mask = case()
    terms = tsd_kd_loss(student, teacher, mask)
    for name in ("indirect", "direct", "entropy"):
        (gradient,) = torch.autograd.grad(getattr(terms, name), student, retain_graph=True)
        assert gradient.abs().sum() > 0
    torch.testing.assert_close(terms.loss, 0.1 * terms.indirect + terms.direct + terms.entropy, **EXACT)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_stands_at_masked_positions_changes_nothing(junk):
    student, teacher, mask = case()
    clean = tsd_kd_loss(student, teacher, mask)
    (expected,) = torch.autograd.grad(clean.loss, student)
    dirty_student = student.detach().masked_fill(~mask.unsqueeze(-1), junk).requires_grad_()
    dirty = tsd_kd_loss(dirty_student, teacher.masked_fill(~mask.unsqueeze(-1), junk), mask)
    (gradient,) = torch.autograd.grad(dirty.loss, dirty_student)
    assert dirty.loss.item() == clean.loss.item()
    assert torch.equal(gradient, expected)
    for name in ("student_entropy", "gate", "divergence", "ranking_nll", "candidate_tau"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name))


def test_masked_equals_shortened_and_holes_are_skipped():
    student, teacher, mask = case(lengths=[6, 6])
    mask = mask.clone()
    mask[:, [1, 4]] = False
    terms = tsd_kd_loss(student, teacher, mask.long())
    shorter = tsd_kd_loss(student[:, [0, 2, 3, 5]], teacher[:, [0, 2, 3, 5]], torch.ones(2, 4))
    torch.testing.assert_close(terms.loss, shorter.loss, **EXACT)
    assert torch.equal(terms.student_entropy[:, [0, 2, 3, 5]], shorter.student_entropy)
    assert (terms.student_entropy[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("empty", ["all masked", "no responses", "no tokens"])
def test_nothing_left_gives_a_zero_that_can_be_backpropagated(empty):
    student, teacher, mask = case()
    if empty == "all masked":
        mask = torch.zeros_like(mask)
    elif empty == "no responses":
        student, teacher, mask = student.detach()[:0].requires_grad_(), teacher[:0], mask[:0]
    else:
        student, teacher, mask = student.detach()[:, :0].requires_grad_(), teacher[:, :0], mask[:, :0]
    terms = tsd_kd_loss(student, teacher, mask)
    terms.loss.backward()
    assert terms.loss.item() == 0 and (student.grad == 0).all()


@given(st.permutations(range(4)), st.sampled_from([[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]]))
def test_the_same_rollouts_give_the_same_loss_however_they_are_split(order, groups):
    torch.manual_seed(1)
    student, teacher, mask = case()
    whole = tsd_kd_loss(student, teacher, mask)
    (expected,) = torch.autograd.grad(whole.loss, student)
    counts = TSDKD().counts(LENGTHS)
    parts = []
    for group in groups:
        rows = [order[i] for i in group]
        width = max(1, max(LENGTHS[r] for r in rows))  # trimmed to its own longest
        parts.append(tsd_kd_loss(student[rows, :width], teacher[rows, :width], mask[rows, :width], counts=counts).loss)
    (gradient,) = torch.autograd.grad(sum(parts), student)
    torch.testing.assert_close(sum(parts), whole.loss, **EXACT)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_counts_from_lengths_equal_the_masks_own():
    student, teacher, mask = case()
    counts = TSDKD().counts(LENGTHS)
    assert counts == Counts(tokens=10, selected=3, responses=3)
    as_tensors = Counts(*(torch.tensor(float(c)) for c in (10, 3, 3)))
    for given_counts in (counts, as_tensors, (10, 3, 3)):
        torch.testing.assert_close(
            tsd_kd_loss(student, teacher, mask, counts=given_counts).loss, tsd_kd_loss(student, teacher, mask).loss, **EXACT
        )


def test_either_vocabulary_may_be_larger():
    student, teacher, mask = case(vocab=14, teacher_vocab=12)
    terms = tsd_kd_loss(student, teacher, mask)
    terms.loss.backward()
    assert (student.grad[..., 12:] == 0).all()
    torch.testing.assert_close(terms.loss, tsd_kd_loss(student[..., :12], teacher, mask).loss, **EXACT)


def test_all_off_is_gkd():
    student, teacher, mask = case(teacher_vocab=12)
    from tsdkd.losses import generalized_jsd

    terms = tsd_kd_loss(student, teacher, mask, gate="none", indirect_weight=0.0, entropy_weight=0.0)
    torch.testing.assert_close(terms.loss, generalized_jsd(student, teacher, 0.9)[mask].mean(), **EXACT)


def test_at_student_equal_teacher_only_the_direct_term_vanishes():
    student, _, mask = case(teacher_vocab=12)
    terms = tsd_kd_loss(student, student.detach(), mask)
    assert terms.direct.item() == pytest.approx(0, abs=1e-12)
    assert terms.indirect.item() > 0 and terms.entropy.item() > 0


def test_a_gate_of_the_users_own():
    student, teacher, mask = case()
    own = tsd_kd_loss(student, teacher, mask, gate=lambda s: torch.sigmoid(s.student_entropy - s.teacher_entropy))
    torch.testing.assert_close(own.loss, tsd_kd_loss(student, teacher, mask).loss, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    student, teacher, mask = case(dtype=dtype)
    terms = tsd_kd_loss(student, teacher, mask)
    assert terms.loss.dtype == torch.float32
    exact = tsd_kd_loss(student.detach().double(), teacher.double(), mask)
    assert torch.equal(terms.opener_mask, exact.opener_mask) and torch.equal(terms.top_entropy_mask, exact.top_entropy_mask)
    # float32 arithmetic on the same (already rounded) logits: a few dozen roundings of 6e-8
    torch.testing.assert_close(terms.loss.double(), exact.loss, rtol=5e-6, atol=0)


def test_logged_sums_divide_to_the_terms():
    student, teacher, mask = case()
    terms = tsd_kd_loss(student, teacher, mask)
    for term in ("indirect", "direct", "entropy"):
        total, count = terms.sums[f"loss/{term}"]
        torch.testing.assert_close(total / count, getattr(terms, term).detach(), **EXACT)
    total, count = terms.sums["opener/tokens"]
    assert total.item() == terms.opener_mask.sum().item() and count.item() == 3
    tau, openers = terms.sums["candidates/tau"]
    assert -1 <= (tau / openers).item() <= 1 and openers == total


BAD = [
    ({"completion_mask": torch.ones(4, 5)}, r"completion_mask has shape \(4, 5\).*\(4, 6\)"),
    ({"completion_mask": [[1] * 6] * 4}, "completion_mask is a list: pass a tensor"),
    ({"counts": 3}, "counts=3: pass tsdkd.Counts"),
    ({"completion_mask": torch.full((4, 6), 2)}, "completion_mask holds the value 2"),
    ({"completion_mask": torch.full((4, 6), 0.5)}, "completion_mask holds the value 0.5"),
    ({"teacher_logits": torch.zeros(4, 5, 12)}, r"student_logits covers .*\(4, 6\).*\(4, 5\)"),
    ({"student_logits": torch.zeros(4, 12)}, r"expected \[batch, completion, size\]"),
    ({"student_logits": torch.zeros(4, 6, 12, dtype=torch.long)}, "expected a floating-point tensor"),
    ({"num_candidates": 13}, "num_candidates=13 but the shared vocabulary has 12"),
    ({"num_candidates": 1}, "num_candidates=1"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"opener_entropy_share": 1.2}, "opener_entropy_share=1.2"),
    ({"top_entropy_fraction": -1}, "top_entropy_fraction=-1"),
    ({"indirect_weight": -1.0}, "indirect_weight=-1.0"),
    ({"entropy_weight": float("nan")}, "entropy_weight=nan"),
    ({"temperature": 0.0}, "kd_temperature=0.0"),
    ({"gate": "entropy"}, "gate='entropy' is unknown; choose one of: divergence_aware, entropy_gap, none"),
    ({"gate_sharpness": -1.0}, "gate_sharpness=-1.0"),
]


@pytest.mark.parametrize("wrong,message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused_with_what_to_do(wrong, message):
    student, teacher, mask = case(teacher_vocab=12)
    arguments = {"student_logits": student, "teacher_logits": teacher, "completion_mask": mask, **wrong}
    with pytest.raises(ValueError, match=message):
        tsd_kd_loss(**arguments)


def test_methods_are_resolved_by_name_or_taken_as_they_are():
    assert resolve_method("tsd_kd", {"beta": 0.5}) == TSDKD(beta=0.5)
    own = TSDKD(gate=EntropyGapGate(2.0))
    assert resolve_method(own) is own
    with pytest.raises(ValueError, match="method='tsdkd' is unknown; choose one of: akl, distillm, gkd, "):
        resolve_method("tsdkd")
    with pytest.raises(ValueError, match="no option 'lambda'; it has: indirect_weight"):
        resolve_method("tsd_kd", {"lambda": 0.5})
    with pytest.raises(ValueError, match=r"method=object is no tsdkd\.methods\.Method: make its class a subclass"):
        resolve_method(object())


# ---------------------------------------------------------------------- from hidden states and heads


def heads(vocab=12, teacher_vocab=14, dtype=torch.float64):
    student = Head(torch.randn(vocab, 5, dtype=dtype), bias=torch.randn(vocab, dtype=dtype), logit_scale=0.5)
    return student, Head(torch.randn(teacher_vocab, 7, dtype=dtype), softcap=3.0)


def test_the_door_equals_the_loss_on_logits():
    student_head, teacher_head = heads()
    hidden = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(hidden, torch.randn(10, 7, dtype=torch.float64), tuple(LENGTHS))
    terms = TSDKD().loss(batch, student_head, teacher_head)
    mask = batch.mask()
    assert mask.shape == (4, 6) and mask.sum(-1).tolist() == LENGTHS

    def spread(packed):
        rows = packed.new_zeros(4, 6, packed.shape[-1])
        rows[mask] = packed
        return rows

    expected = tsd_kd_loss(spread(student_head.logits(hidden)), spread(teacher_head.logits(batch.teacher_hidden)), mask)
    torch.testing.assert_close(terms.loss, expected.loss, **EXACT)
    assert torch.equal(terms.opener_mask, expected.opener_mask)
    (gradient,) = torch.autograd.grad(terms.loss, hidden, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss, hidden)[0], **EXACT)


def test_a_head_scales_then_caps_and_is_cut():
    head = Head(torch.eye(3), bias=torch.tensor([0.0, 1.0, 0.0]), logit_scale=2.0, softcap=4.0)
    hidden = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(head.logits(hidden), 4 * torch.tanh(torch.tensor([[2.0, 6.0, 6.0]]) / 4))
    assert head.cut(2).logits(hidden).shape == (1, 2)
    linear = torch.nn.Linear(3, 4)
    torch.testing.assert_close(Head.of(linear).logits(hidden), linear(hidden))
    assert Head.of(torch.ones(4, 3)).size == 4


def test_the_door_refuses_what_does_not_fit():
    student_head, teacher_head = heads()
    batch = TokenBatch(torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.float64), (1, 2))
    with pytest.raises(ValueError, match="student_hidden has 5 features but the student's head takes 7"):
        TSDKD().loss(batch, teacher_head, teacher_head)
    with pytest.raises(ValueError, match="impl='cuda' is unknown; choose one of: auto"):
        TSDKD().loss(batch, student_head, teacher_head, impl="cuda")
    with pytest.raises(ValueError, match=r"the completions hold 4 tokens"):
        TokenBatch(torch.zeros(3, 5), torch.zeros(3, 7), (1, 3))
    with pytest.raises(ValueError, match="num_candidates=20 but the shared vocabulary has 12"):
        TSDKD(num_candidates=20).loss(batch, student_head, teacher_head)
    with pytest.raises(ValueError, match="a head is a weight tensor"):
        Head.of("lm_head")
    assert fused.ENGINES[0] == "auto"

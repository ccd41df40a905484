"""Divergences, entropy and ranking against the oracle, and the laws that every one of them keeps."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd import losses

# One line per divergence: every law below runs over it.
DIVERGENCES = {
    "forward_kl": (losses.forward_kl, oracles.forward_kl),
    "reverse_kl": (losses.reverse_kl, oracles.reverse_kl),
    **{
        f"jsd({beta})": (
            lambda s, t, temperature=1.0, b=beta: losses.generalized_jsd(s, t, b, temperature),
            lambda s, t, temperature=1.0, b=beta: oracles.generalized_jsd(s, t, b, temperature),
        )
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0)
    },
    **{
        f"skew_forward({alpha})": (
            lambda s, t, temperature=1.0, a=alpha: losses.skew_forward_kl(s, t, a, temperature),
            lambda s, t, temperature=1.0, a=alpha: oracles.skew_forward_kl(s, t, a, temperature),
        )
        for alpha in (0.0, 0.1, 0.7)
    },
    **{
        f"skew_reverse({alpha})": (
            lambda s, t, temperature=1.0, a=alpha: losses.skew_reverse_kl(s, t, a, temperature),
            lambda s, t, temperature=1.0, a=alpha: oracles.skew_reverse_kl(s, t, a, temperature),
        )
        for alpha in (0.0, 0.1, 0.7)
    },
}
over_divergences = pytest.mark.parametrize("name", DIVERGENCES)
# Rounding of float64 sums over a vocabulary of a dozen; the bound.
EXACT = dict(rtol=1e-9, atol=1e-9)


def logits(*shape, scale=2.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


@over_divergences
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_value_and_gradient_equal_the_oracle(name, temperature):
    ours, oracle = DIVERGENCES[name]
    student, teacher = logits(3, 11).requires_grad_(), logits(3, 11)
    values = ours(student, teacher, temperature=temperature)
    assert values.shape == (3,)
    values.sum().backward()
    for row in range(3):
        s, t = student[row].tolist(), teacher[row].tolist()
        torch.testing.assert_close(values[row].item(), oracle(s, t, temperature=temperature), **EXACT)
        gradient = oracles.gradient(lambda x, t=t: oracle(x, t, temperature=temperature), s)
        torch.testing.assert_close(student.grad[row], torch.tensor(gradient, dtype=torch.float64), **EXACT)


@over_divergences
def test_zero_when_equal_and_never_negative(name):
    ours, _ = DIVERGENCES[name]
    student = logits(5, 9)
    torch.testing.assert_close(ours(student, student), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (ours(student, logits(5, 9)) > 0).all()


@over_divergences
def test_unchanged_by_a_constant_and_by_permuting_the_vocabulary(name):
    ours, _ = DIVERGENCES[name]
    student, teacher = logits(4, 9), logits(4, 9)
    value = ours(student, teacher)
    torch.testing.assert_close(ours(student + 5.0, teacher - 3.0), value, **EXACT)
    order = torch.randperm(9)
    torch.testing.assert_close(ours(student[:, order], teacher[:, order]), value, **EXACT)


@over_divergences
def test_a_batch_equals_its_rows(name):
    ours, _ = DIVERGENCES[name]
    student, teacher = logits(2, 3, 9), logits(2, 3, 9)
    rows = [ours(student[i, j], teacher[i, j]) for i, j in itertools.product(range(2), range(3))]
    torch.testing.assert_close(ours(student, teacher).flatten(), torch.stack(rows), **EXACT)


@over_divergences
def test_no_gradient_reaches_the_teacher(name):
    ours, _ = DIVERGENCES[name]
    student, teacher = logits(2, 7).requires_grad_(), logits(2, 7).requires_grad_()
    ours(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@over_divergences
def test_gradcheck(name):
    ours, _ = DIVERGENCES[name]
    teacher = logits(2, 6)
    assert torch.autograd.gradcheck(lambda s: ours(s, teacher), logits(2, 6).requires_grad_())


@over_divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_for_huge_logits(name, dtype):
    ours, _ = DIVERGENCES[name]
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    values = ours(student, torch.tensor([[1e4, -1e4, 0.0], [1e4, 0.0, -1e4]], dtype=dtype))
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(student.grad).all()


@over_divergences
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    ours, _ = DIVERGENCES[name]
    student, teacher = logits(4, 50, dtype=dtype), logits(4, 50, dtype=dtype)
    assert ours(student, teacher).dtype == torch.float32
    torch.testing.assert_close(ours(student, teacher), ours(student.float(), teacher.float()), rtol=0, atol=0)


@over_divergences
def test_unequal_shapes_are_refused(name):
    ours, _ = DIVERGENCES[name]
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\).*shared_vocabulary"):
        ours(logits(2, 5), logits(2, 6))
    with pytest.raises(ValueError, match="temperature=0"):
        ours(logits(2, 5), logits(2, 5), temperature=0.0)


@pytest.mark.parametrize("function", [losses.generalized_jsd, losses.skew_forward_kl, losses.skew_reverse_kl])
def test_a_mixture_outside_zero_one_is_refused(function):
    with pytest.raises(ValueError, match=r"=1.5: a share lies in \[0, 1\]"):
        function(logits(2, 5), logits(2, 5), 1.5)


def test_jsd_ratios_tend_to_the_kls():
    student, teacher = logits(3, 8, scale=0.5), logits(3, 8, scale=0.5)
    for beta, limit in ((1e-7, losses.forward_kl), (1 - 1e-7, losses.reverse_kl)):
        ratio = losses.generalized_jsd(student, teacher, beta) / min(beta, 1 - beta)
        # The first correction is of order β times the chi-square distance, about 1 here.
        torch.testing.assert_close(ratio, limit(student, teacher), rtol=1e-5, atol=0)


def test_jsd_is_symmetric_at_a_half_and_bounded():
    student, teacher = logits(3, 8, scale=20.0), logits(3, 8, scale=20.0)
    there, back = losses.generalized_jsd(student, teacher, 0.5), losses.generalized_jsd(teacher, student, 0.5)
    torch.testing.assert_close(there, back, **EXACT)
    assert (there <= math.log(2) + 1e-12).all()


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_any_divergence_is_finite_and_non_negative(values, rng):
    teacher = list(values)
    rng.shuffle(teacher)
    student, teacher = torch.tensor(values, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    for ours, _ in DIVERGENCES.values():
        value = ours(student, teacher).item()
        assert math.isfinite(value) and value >= -1e-12


def test_entropy_equals_the_oracle_and_its_ends():
    student = logits(4, 13).requires_grad_()
    for temperature in (0.5, 1.0, 3.0):
        entropy = losses.token_entropy(student, temperature)
        (gradient,) = torch.autograd.grad(entropy.sum(), student)
        for row in range(4):
            x = student[row].tolist()
            torch.testing.assert_close(entropy[row].item(), oracles.entropy(x, temperature), **EXACT)
            expected = oracles.gradient(lambda x, tau=temperature: oracles.entropy(x, tau), x)
            torch.testing.assert_close(gradient[row], torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(losses.token_entropy(torch.zeros(7)).item(), math.log(7), rtol=1e-6, atol=0)
    assert losses.token_entropy(torch.tensor([1e4, 0.0])).item() == 0.0
    assert torch.autograd.gradcheck(losses.token_entropy, logits(2, 5).requires_grad_())


def test_plackett_luce_equals_the_enumeration_of_all_orders():
    for k in (2, 3, 5):
        scores = logits(k)
        value = losses.plackett_luce_nll(scores).item()
        torch.testing.assert_close(value, oracles.plackett_luce_nll_by_enumeration(scores.tolist()), **EXACT)
        orders = torch.stack([scores[list(order)] for order in itertools.permutations(range(k))])
        torch.testing.assert_close(torch.exp(-losses.plackett_luce_nll(orders)).sum().item(), 1.0, **EXACT)


def test_plackett_luce_prefers_the_teachers_order():
    """The reversed direction passes gradcheck and 'all orders sum to one'; only the value tells."""
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert round(losses.plackett_luce_nll(scores).item(), 2) == 1.61
    assert round(losses.plackett_luce_nll(scores.flip(0)).item(), 2) == 11.61


def test_plackett_luce_gradient_equals_the_oracle_and_gradcheck():
    scores = logits(10).requires_grad_()
    losses.plackett_luce_nll(scores).backward()
    expected = oracles.gradient(oracles.plackett_luce_nll, scores.tolist())
    torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert torch.autograd.gradcheck(losses.plackett_luce_nll, logits(3, 4).requires_grad_())


def test_plackett_luce_of_equal_scores_is_log_k_factorial_and_finite_when_huge():
    torch.testing.assert_close(losses.plackett_luce_nll(torch.zeros(6)).item(), math.log(math.factorial(6)), rtol=1e-6, atol=0)
    scores = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    losses.plackett_luce_nll(scores).backward()
    assert torch.isfinite(scores.grad).all()


def test_proposition_1():
    """For k = 2 the NLL is Bradley-Terry's over sub-responses rewarded by their log-probability under the student."""
    length, vocab = 4, 6
    for t in range(length):
        student, teacher = logits(length, vocab), logits(vocab)
        written = torch.randint(vocab, (length,)).tolist()
        pair = losses.student_candidates(student[t], 2)
        order = losses.teacher_order(teacher[pair])
        best, other = pair[order].tolist()
        rewards = [oracles.sub_response_reward(student[: t + 1].tolist(), [*written[:t], token]) for token in (best, other)]
        nll = losses.plackett_luce_nll(student[t][pair[order]]).item()
        torch.testing.assert_close(nll, oracles.bradley_terry_nll(*rewards), **EXACT)


@given(st.lists(st.integers(-3, 3), min_size=4, max_size=12), st.integers(2, 4))
def test_candidates_and_order_equal_the_oracle_with_ties(values, k):
    student = torch.tensor(values, dtype=torch.float64)
    teacher = torch.tensor([v * v % 3 for v in values], dtype=torch.float64)
    ids = losses.student_candidates(student, k)
    assert ids.tolist() == oracles.candidates(student.tolist(), k)
    ranked = ids[losses.teacher_order(teacher[ids])]
    assert ranked.tolist() == oracles.teacher_order(student.tolist(), teacher.tolist(), k)


def test_a_flat_teacher_keeps_the_students_order():
    ids = losses.student_candidates(logits(20), 5)
    assert losses.teacher_order(torch.zeros(5)).tolist() == list(range(5)) and len(set(ids.tolist())) == 5


@pytest.mark.parametrize("k", [0, 1, 8, 2.5, True])
def test_impossible_numbers_of_candidates_are_refused(k):
    with pytest.raises(ValueError, match="num_candidates"):
        losses.student_candidates(torch.zeros(7), k)


def test_kendall_tau_equals_the_oracle():
    for order in itertools.permutations(range(4)):
        assert losses.kendall_tau(torch.tensor(order)).item() == pytest.approx(oracles.kendall_tau(list(order)))


def test_shared_vocabulary_cuts_to_the_first_ids():
    student, teacher = losses.shared_vocabulary(torch.arange(5.0), torch.arange(8.0))
    assert teacher.tolist() == student.tolist() == [0, 1, 2, 3, 4]

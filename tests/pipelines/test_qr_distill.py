"""QR-Distill's mathematics: gradients reach what is to be trained, and the values are those of the paper's equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tsdkd.pipelines.qr_distill import (
    Mutual,
    Router,
    aligned,
    gumbel_on_off,
    qr_objective,
    routing_entropy,
    temperature_at,
)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def gumbel(shape, seed):
    return -torch.log(-torch.log(torch.rand(shape, generator=draws(seed), dtype=torch.float64)))


# ---------------------------------------------------------------------- routing


@given(st.integers(0, 1000), st.floats(0.05, 5))
@settings(max_examples=50, deadline=None)
def test_gates_are_on_or_off_and_their_gradient_is_the_relaxed_ones(seed, temperature):
    logits = torch.randn(5, 3, 2, generator=draws(seed), dtype=torch.float64, requires_grad=True)
    noise = gumbel((5, 3, 2), seed + 1)
    alpha, soft = gumbel_on_off(logits, temperature, noise)
    assert set(alpha.detach().round(decimals=12).flatten().tolist()) <= {0.0, 1.0}
    relaxed = torch.sigmoid(((logits + noise)[..., 1] - (logits + noise)[..., 0]) / temperature)
    torch.testing.assert_close(soft, relaxed)
    assert torch.equal(alpha.detach() > 0.5, ((logits + noise)[..., 1] > (logits + noise)[..., 0]).detach())
    weights = torch.randn(5, 3, generator=draws(seed + 2), dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * alpha).sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad((weights * relaxed).sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_the_routers_gradient_is_that_of_the_objective_by_finite_differences():
    """Of the mean over given paths and the entropy for each gate, and of the relaxed gates for the router's weights."""
    torch.manual_seed(0)
    router = Router(4, 2, hidden=6).double().train()
    encodings, losses = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    questions, noise = [0, 0, 0, 1, 1, 1], gumbel((6, 2, 2), 3)

    def gates(*p):
        hidden = torch.nn.functional.gelu(encodings @ p[0].T + p[1])
        return gumbel_on_off((hidden @ p[2].T + p[3]).unflatten(-1, (2, 2)), 0.7, noise)

    def objective(alpha):  # Eq. 3, 4 and 9, where a student's loss is the mean over what it is given
        mean = 1e-6 + (1 - 2e-6) * alpha.reshape(2, 6).mean(1)
        entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean()
        return ((alpha * losses).sum(0) / alpha.sum(0)).sum() - 0.3 * entropy

    parameters = [p.detach().clone().requires_grad_() for p in router.parameters()]
    alpha, _ = gates(*parameters)
    assert ((alpha.detach() > 0.5).sum(0) > 0).all() and not torch.all(alpha.detach() > 0.5)
    value = qr_objective(losses, alpha, questions, entropy_weight=0.3).loss
    hard = alpha.detach()
    assert value.item() == pytest.approx(objective(hard).item())
    slopes = torch.zeros_like(hard)
    for place in itertools.product(range(6), range(2)):
        step = torch.zeros_like(hard)
        step[place] = 1e-6
        slopes[place] = (objective(hard + step) - objective(hard - step)) / 2e-6
    ours = torch.autograd.grad(value, parameters)
    linear = lambda *p: (slopes * gates(*p)[1]).sum()  # noqa: E731
    assert gradcheck(linear, parameters, eps=1e-6, atol=1e-6)
    for one, other in zip(ours, torch.autograd.grad(linear(*parameters), parameters), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_router_of_paths_that_are_alike_does_not_learn_to_teach_nobody():
    """With losses between 0.5 and 0.8; where the divisor is held fixed every gate goes off within some hundred steps."""
    shares = {}
    for kind in ("ours", "held"):
        torch.manual_seed(0)
        router, draw = Router(16, 2), draws(1)
        encodings, losses = torch.randn(64, 16, generator=draw), 0.5 + 0.3 * torch.rand(64, 2, generator=draw)
        optimizer, on = torch.optim.AdamW(router.parameters(), 1e-3, weight_decay=0.0), []
        for step in range(400):
            rows = torch.randperm(64, generator=draw)[:8]
            alpha = router(encodings[rows], temperature_at(step, 400), draws(step)).alpha
            if kind == "ours":
                loss = qr_objective(losses[rows], alpha, [0] * 8).loss
            else:
                held = alpha.detach().sum(0).clamp(min=1)
                loss = ((alpha * losses[rows]).sum(0) / held).sum() - 0.01 * routing_entropy(alpha, [0] * 8)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on.append(alpha.detach().mean().item())
        shares[kind] = sum(on[-100:]) / 100
    assert shares["held"] < 0.1 and shares["ours"] > 0.3, shares


def test_noise_is_drawn_in_training_alone_by_the_generator_that_is_given():
    torch.manual_seed(0)
    router, encodings = Router(4, 3), torch.randn(40, 4)
    first, again, other = (router(encodings, 1.0, draws(seed)).alpha for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    router.eval()
    calm = router(encodings, 1.0)
    assert torch.equal(calm.alpha.detach() > 0.5, calm.logits > 0)
    router.train()
    rates = torch.stack([router(encodings, 1.0, draws(seed)).alpha for seed in range(400)]).mean(0)
    assert (rates - torch.sigmoid(calm.logits)).abs().max() < 0.12  # a gate is on as often as its logit says


@pytest.mark.parametrize(
    "rows,mean",
    [
        ([[1, 0], [1, 0]], 0.5),
        ([[1, 1], [0, 0]], 0.5),
        ([[1, 1], [1, 1]], 1.0),
        ([[0, 0], [0, 0]], 0.0),
        ([[1, 0], [0, 0]], 0.25),
    ],
)
def test_the_entropys_value_on_hand_made_routings(rows, mean):
    binary = lambda p: 0.0 if p in (0, 1) else -p * math.log(p) - (1 - p) * math.log(1 - p)  # noqa: E731
    alpha = torch.tensor(rows, dtype=torch.float64)
    assert routing_entropy(alpha, [0, 0]).item() == pytest.approx(binary(mean), abs=2e-5)
    own = [binary(alpha[:, s].mean().item()) for s in range(2)]
    assert routing_entropy(alpha, [0, 0], per_student=True).item() == pytest.approx(sum(own) / 2, abs=2e-5)
    both = torch.cat([alpha, torch.ones_like(alpha)])
    assert routing_entropy(both, ["a", "a", "b", "b"]).item() == pytest.approx(binary(mean) / 2, abs=2e-5)


def test_the_entropy_is_maximised_and_has_a_gradient_at_the_edges():
    losses = torch.zeros(4, 2, dtype=torch.float64)
    for start in (0.0, 1.0):
        alpha = torch.full((4, 2), start, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(qr_objective(losses, alpha, [0] * 4).loss, alpha)
        assert torch.isfinite(gradient).all() and ((gradient < 0) if start == 0 else (gradient > 0)).all()  # back to a half
    even = torch.full((4, 2), 0.5, dtype=torch.float64)
    assert qr_objective(losses, even, [0] * 4).loss.item() == pytest.approx(-0.01 * math.log(2))


def test_the_temperatures_schedule():
    assert [temperature_at(step, 11, 2.0, 1.0, "linear") for step in (0, 5, 10, 99)] == [2.0, 1.5, 1.0, 1.0]
    assert temperature_at(0, 1) == 1.0
    with pytest.raises(ValueError, match="how="):
        temperature_at(0, 1, how="cosine")


# ---------------------------------------------------------------------- mutual distillation


def test_competences_sum_to_one_and_everything_has_a_gradient():
    torch.manual_seed(0)
    mutual = Mutual([8, 12, 6], shared=5, how="mean")
    states = {0: torch.randn(7, 8, requires_grad=True), 2: torch.randn(4, 6, requires_grad=True)}
    result = mutual(states)
    assert set(result.competence) == {0, 2} and sum(result.competence.values()).item() == pytest.approx(1)
    result.loss.backward()
    for student in (0, 2):
        assert states[student].grad.abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in mutual.projections[student].parameters())
        assert mutual.competence[student].weight.grad.abs().max() > 0
    assert mutual.projections[1].weight.grad is None
    with pytest.raises(ValueError, match="between students"):
        mutual({0: torch.randn(7, 8)})


def test_equations_6_to_8_by_hand():
    torch.manual_seed(1)
    mutual = Mutual([3, 3], shared=2, how="tokens").double()
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    result = mutual({0: a, 1: b})
    za, zb = mutual.projections[0](a), mutual.projections[1](b)
    scores = torch.stack([mutual.competence[0].weight[0] @ za.mean(0), mutual.competence[1].weight[0] @ zb.mean(0)])
    gamma = scores.exp() / scores.exp().sum()
    ensemble = gamma[0] * za + gamma[1] * zb
    expected = ((za - ensemble) ** 2).mean() + ((zb - ensemble) ** 2).mean()
    torch.testing.assert_close(result.loss, expected)


def test_equal_students_have_nothing_to_learn_from_each_other():
    torch.manual_seed(0)
    mutual = Mutual([5, 5], shared=4, how="tokens")
    mutual.projections[1].load_state_dict(mutual.projections[0].state_dict())
    states = torch.randn(6, 5)
    result = mutual({0: states, 1: states.clone()})
    assert result.loss.item() == pytest.approx(0, abs=1e-12) and result.norm > 0


def test_the_papers_loss_falls_by_collapsing_and_the_normalised_does_not():
    torch.manual_seed(0)
    states = {0: torch.randn(6, 5), 1: torch.randn(6, 5)}
    for normalise, falls in ((False, True), (True, False)):
        mutual = Mutual([5, 5], shared=4, how="tokens", normalise=normalise)
        before = mutual(states)
        with torch.no_grad():
            for projection in mutual.projections:
                projection.weight.mul_(0.1), projection.bias.mul_(0.1)
            after = mutual(states)
        assert after.norm.item() == pytest.approx(0.1 * before.norm.item(), rel=1e-4)  # which is why it is logged
        assert (after.loss.item() < 0.05 * before.loss.item()) is falls


def test_alignment_by_characters():
    text = "12+5=17"
    spans = {0: [(i, i + 1) for i in range(7)], 1: [(0, 3), (3, 7)]}  # characters, and two pieces
    states = {0: torch.arange(7.0)[:, None], 1: torch.tensor([[10.0], [20.0]])}
    placed, weights = aligned(states, "characters", spans)
    assert placed[0][:, 0].tolist() == list(range(7)) and placed[1][:, 0].tolist() == [10.0] * 3 + [20.0] * 4
    assert weights.tolist() == pytest.approx([1 / 7] * 7) and len(text) == 7
    other, sizes = aligned(states, "characters", {0: spans[0], 1: [(0, 2), (4, 7)]})  # a gap that a tokenizer leaves out
    assert other[0][:, 0].tolist() == [0, 1, 4, 5, 6] and sizes.sum() == pytest.approx(1)
    mean, one = aligned(states, "mean")
    assert mean[0].item() == 3 and mean[1].item() == 15 and one.tolist() == [1]
    with pytest.raises(ValueError, match="align by characters"):
        aligned(states, "tokens")
    with pytest.raises(ValueError, match="spans"):
        aligned(states, "characters")
    with pytest.raises(ValueError, match="no piece"):
        aligned(states, "characters", {0: [(0, 1)] * 7, 1: [(1, 2), (2, 3)]})


# ---------------------------------------------------------------------- the whole


def test_everything_to_both_students_is_two_students_alone():
    losses = torch.rand(6, 2, dtype=torch.float64, generator=draws(0), requires_grad=True)
    questions = [0, 0, 0, 1, 1, 1]
    both = qr_objective(losses, torch.ones(6, 2, dtype=torch.float64), questions, entropy_weight=0, mutual_weight=0)
    alone = losses[:, 0].mean() + losses[:, 1].mean()
    torch.testing.assert_close(both.loss, alone)
    torch.testing.assert_close(*(torch.autograd.grad(value, losses)[0] for value in (both.loss, alone)))


def test_a_student_that_is_given_nothing_has_no_loss_and_no_nan():
    losses = torch.rand(4, 2, dtype=torch.float64, generator=draws(0), requires_grad=True)
    alpha = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64, requires_grad=True)
    found = qr_objective(losses, alpha, [0, 0, 1, 1])
    assert found.distill[1] == 0 and torch.isfinite(found.loss)
    found.loss.backward()
    assert losses.grad[:, 1].abs().max() == 0 and torch.isfinite(alpha.grad).all()


def test_the_terms_make_the_loss_and_bad_input_is_told():
    losses, alpha = torch.rand(4, 2, generator=draws(0)), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    mutual = [torch.tensor(0.5), torch.tensor(1.5)]
    found = qr_objective(losses, alpha, [0, 0, 1, 1], mutual, entropy_weight=0.3, mutual_weight=0.7)
    assert found.mutual == 1.0
    torch.testing.assert_close(found.loss, found.distill.sum() - 0.3 * found.entropy + 0.7 * found.mutual)
    with pytest.raises(ValueError, match="one row a path"):
        qr_objective(losses, alpha[:3], [0, 0, 1, 1])
    with pytest.raises(ValueError, match="mutual_weight"):
        qr_objective(losses, alpha, [0, 0, 1, 1], mutual_weight=-1)
    with pytest.raises(ValueError, match="temperature"):
        gumbel_on_off(torch.zeros(1, 2), 0.0)

"""Low precision, large logits, autocast, compilation and sharded heads."""

from __future__ import annotations

import math

import pytest
import torch
from fused_cases import (
    ENGINES,
    OBJECTIVES,
    case,
    gradients,
)

from tsdkd import TSDKD, Head, TokenBatch, fused, fused_tsd_kd_loss


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

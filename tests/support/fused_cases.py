"""Hidden states, heads and objectives that the laws of the engines run over."""

from __future__ import annotations

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsdkd import TSDKD, Head, TokenBatch, fused
from tsdkd.losses import resolve_divergence
from tsdkd.selection import SELECTIONS, EntropyGapGate, TopEntropy
from tsdkd.types import DivergenceTerm, EntropyTerm, Objective, RankingTerm, ReadPlan, SampledTerm

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


def plan_of(batch, teacher):
    return ReadPlan(batch.lengths, batch.lengths, tuple(teacher))

"""A divergence of your own: a function of two logit tensors, in a loss, in any method, and registered by a name."""

import torch

from tsdkd import tsd_kd_loss
from tsdkd.losses import DIVERGENCES
from tsdkd.methods import GKD


def total_variation(student_logits, teacher_logits):
    """`[tokens, vocab]` each, divided by τ, to `[tokens]`."""
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2


student = torch.randn(2, 5, 32, requires_grad=True)
terms = tsd_kd_loss(student, torch.randn(2, 5, 32), torch.ones(2, 5), divergence=total_variation)
terms.loss.backward()
DIVERGENCES["total_variation"] = total_variation  # a name in this process, for tsd_kd and gkd
print(f"direct {terms.direct.item():.3f}", GKD(divergence="total_variation").divergence_of().name)

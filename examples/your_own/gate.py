"""A gate of your own: how much each token of the divergence weighs, from its own statistics."""

import torch

from tsdkd import tsd_kd_loss


def surer_teacher(statistics):
    """1 where the teacher is surer than the student, else a tenth; `[completions, longest]`."""
    return torch.where(statistics.teacher_entropy < statistics.student_entropy, 1.0, 0.1)


student = torch.randn(2, 5, 32, requires_grad=True)
terms = tsd_kd_loss(student, torch.randn(2, 5, 32), torch.ones(2, 5), gate=surer_teacher)
terms.loss.backward()
print(f"weights {terms.gate.unique().tolist()}")

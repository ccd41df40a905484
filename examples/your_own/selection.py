"""A selection of your own: which tokens of a completion the divergence takes."""

import torch

from tsdkd import tsd_kd_loss


def disagreements(statistics):
    """The tokens where the two models favour different words; a bool mask `[completions, longest]`."""
    return statistics.top1_agreement == 0


student = torch.randn(2, 50, 32, requires_grad=True)
terms = tsd_kd_loss(student, torch.randn(2, 50, 32), torch.ones(2, 50), selection=disagreements)
terms.loss.backward()
print(f"{int(terms.selected_mask.sum())} of 100 tokens are taken")

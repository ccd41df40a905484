"""How likely the student holds an end to be where its completions stop: it falls before they grow longer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsdkd.types import Head


@torch.no_grad()
def end_probability(
    hidden: torch.Tensor, lengths: Sequence[int], wholes: Sequence[int], head: Head, ends: Sequence[int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The student's probability of an end in place of each completion's last token, ended or cut, as a sum and its count.

    Args:
        hidden: `[tokens, hidden]`, packed, of what was read.
        lengths: read of each completion, tokens; their sum is `tokens`.
        wholes: the completions' own lengths; one that was not read to its last token is left out.
        ends: the ids that end one; none: nothing is logged.

    Returns:
        `{"completions/end_probability": (sum, count)}`, 0-d.
    """
    last, stop = [], 0
    for length, whole in zip(lengths, wholes, strict=True):
        stop += length
        if length and length == whole:
            last.append(stop - 1)
    if not ends:
        return {}
    name = "completions/end_probability"  # of a process without any, too: all log the same names
    if not last:
        return {name: (hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32))}
    logits = head.logits(hidden[torch.tensor(last, device=hidden.device)].detach()).float()
    ending = logits.softmax(-1)[:, torch.tensor(list(ends), device=hidden.device)].sum(-1)
    return {name: (ending.sum(), torch.tensor(float(len(last)), device=hidden.device))}

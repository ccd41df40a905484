"""Which tokens the terms take: from per-token statistics to masks and weights, without gradient.

Two kinds of rule, and neither sees a kernel. A **gate** reads one token's own statistics and weighs it. A **selection** reads
a completion's statistics and keeps some of its tokens. A rule says with `needs` what it reads: `"lengths"` (no statistics),
`"token"` (its own token's), `"student"` (the student's statistics of the completion) or `"both"`; a selection that says
nothing may read both, a gate its own token. A selection whose size lengths alone tell has `count(length)`. Any function of
`TokenStatistics` is a rule; a term wraps it once (`types.Rule`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tsdkd.checks import check_choice, check_share
from tsdkd.selection.adaptive import AdaptiveOpener, OpenerHistory
from tsdkd.selection.gates import DivergenceAwareGate, EntropyGapGate, entropy_gap_gate
from tsdkd.selection.masks import opener_mask, top_count, top_entropy_mask
from tsdkd.selection.selections import EntropyOrDivergence, Opener, Prefix, RandomTokens, TopEntropy
from tsdkd.types import Rule, TokenStatistics

Gate = Callable[[TokenStatistics], torch.Tensor]
Selection = Callable[[TokenStatistics], torch.Tensor]
GATES: dict[str, Callable[[float], Gate | None]] = {
    "none": lambda sharpness: None,
    "entropy_gap": EntropyGapGate,
    "divergence_aware": DivergenceAwareGate,
}
SELECTIONS: dict[str, Callable[[float], Selection | None]] = {
    "none": lambda share: None,
    "opener": Opener,
    "top_entropy": TopEntropy,
    "entropy_or_divergence": lambda share: EntropyOrDivergence(share / 2, share / 2),
    "random": RandomTokens,
    "prefix": Prefix,
}


def resolve_gate(gate: str | Gate | None, gate_sharpness: float = 1.0) -> Gate | None:
    """A gate from its name or from a function of `TokenStatistics`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if gate is None or callable(gate):
        return gate
    check_choice("gate", gate, GATES)
    return GATES[gate](gate_sharpness)


def resolve_selection(selection: str | Selection | None, share: float = 0.5) -> Selection | None:
    """A selection of the direct term from its name and share, or from a function of `TokenStatistics`.

    Args:
        selection: a name in `SELECTIONS`, a function that returns a bool mask `[completions, longest]`, or None for all.
        share: of a completion's tokens (`"opener"`: of its entropy; `"entropy_or_divergence"`: half to each region).

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a share outside [0, 1].
    """
    check_share("selection_share", share)
    if selection is None or callable(selection):
        return selection
    check_choice("selection", selection, SELECTIONS)
    return SELECTIONS[selection](share)


def direct_count(selection: Selection | None, lengths: Sequence[int]) -> int:
    """What a divergence term on selected tokens is divided by.

    Their number where lengths tell it; else the number of completions with a token, each giving the mean over its own
    selected tokens: so it is exact whatever the batching.
    """
    rule = Rule.of(selection, "selection")
    if rule is None:
        return sum(lengths)
    return sum(length > 0 for length in lengths) if rule.count is None else sum(rule.count(length) for length in lengths)


__all__ = [
    "GATES",
    "SELECTIONS",
    "AdaptiveOpener",
    "DivergenceAwareGate",
    "EntropyGapGate",
    "EntropyOrDivergence",
    "Gate",
    "Opener",
    "OpenerHistory",
    "Prefix",
    "RandomTokens",
    "Selection",
    "TopEntropy",
    "direct_count",
    "entropy_gap_gate",
    "opener_mask",
    "resolve_gate",
    "resolve_selection",
    "top_count",
    "top_entropy_mask",
]

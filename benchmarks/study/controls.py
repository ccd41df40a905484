"""Controls and candidates of the study, as methods of one's own: `python benchmarks/study/controls.py …` is `tsdkd …` that
knows them by name.

The controls are what the method is not, so they are no options of the library: the ranking direction and the opener of the
authors' release, openers and tokens at random, a loss without any teacher.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from tsdkd.losses import plackett_luce_nll, resolve_divergence, student_candidates, teacher_order
from tsdkd.methods import GKD, METHODS, TSDKD
from tsdkd.methods.base import Method
from tsdkd.selection import Opener, opener_mask
from tsdkd.types import DivergenceTerm, Objective, SampledTerm, TokenStatistics


@dataclass(frozen=True)
class ReversedRanking:
    """The likelihood of the reversed ranking, as the authors' release computes it: log-sum-exp over the items placed so far."""

    k: int

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        candidates = student_candidates(student, self.k)
        order = teacher_order(teacher.gather(-1, candidates))
        return plackett_luce_nll(student.gather(-1, candidates.gather(-1, order)).flip(-1))


class FlattenedOpener:
    """Where the entropies of the whole batch, one completion behind the other and padded, reach the share: that index, as a
    column of every completion, the crossing token left out (the authors' release)."""

    needs = "student"

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        cumulative = torch.where(statistics.mask, statistics.student_entropy.double(), 0.0).flatten().cumsum(0)
        crossing = int((cumulative < self.share * cumulative[-1:]).sum())
        return statistics.mask & (torch.arange(statistics.mask.shape[1]) < crossing)


class RandomOpener:
    """As many tokens of a completion as its opener has, drawn at random."""

    needs = "student"

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        mask = statistics.mask
        wanted = opener_mask(statistics.student_entropy, mask, self.share).sum(-1, keepdim=True)
        rows = range(len(mask)) if statistics.rows is None else statistics.rows
        lots = torch.stack([torch.rand(mask.shape[1], generator=torch.Generator().manual_seed(7919 + row)) for row in rows])
        order = lots.masked_fill(~mask, 2.0).argsort(-1).argsort(-1)
        return mask & (order < wanted)


@dataclass(frozen=True)
class Controlled(TSDKD):
    """TSD-KD with its ranking term put wrong.

    Attributes:
        ranking: `"reversed"` or `"right"`.
        opener: `"own"`, `"flattened"` or `"random"`.
    """

    ranking: str = "right"
    opener: str = "own"
    name = "controlled"

    def objective(self, batch=None, state=None) -> Objective:
        made = super().objective(batch, state)
        indirect, *rest = made.terms
        share = self.opener_entropy_share
        selection = {"own": Opener, "flattened": FlattenedOpener, "random": RandomOpener}[self.opener](share)
        if self.ranking == "reversed":
            divergence = ReversedRanking(self.num_candidates)
            term = DivergenceTerm(name="indirect", weight=indirect.weight, divergence=divergence, selection=selection)
            return Objective((*rest, term), made.temperature)  # the direct term's divergence is what statistics hold
        return Objective((replace(indirect, selection=selection), *rest), made.temperature)


@dataclass(frozen=True, kw_only=True)
class Suppression(Method):
    """No teacher: a constant negative advantage on every token that the student sampled (the control of arXiv 2608.31046).

    Attributes:
        advantage: below 0; the loss is −advantage · log p_S(y_t).
    """

    advantage: float = -0.1
    name = "suppression"
    title = "Suppression"
    paper = GKD.paper

    def objective(self, batch=None, state=None) -> Objective:
        advantage = self.advantage
        return Objective((SampledTerm(name="sampled", function=lambda log_probs, rows: -advantage * log_probs),))


@dataclass(frozen=True)
class Teachable:
    """The generalized JSD, weighed by how much of what the teacher would move lies within the student's reach.

    Of the mass that the teacher gives more of than the student, Σ max(0, p_T − p_S), the share on the student's own k best
    tokens; no gradient flows through it. A rule of ours after the idea of teachable tokens (TA-OPD, arXiv 2605.26844), whose
    equations were not at hand.
    """

    k: int = 10
    beta: float = 0.9

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            corrective = (teacher.softmax(-1) - student.softmax(-1)).clamp(min=0)
            inside = corrective.gather(-1, student.topk(self.k).indices).sum(-1)
            weight = inside / corrective.sum(-1).clamp(min=1e-12)
        return weight * resolve_divergence("generalized_jsd", beta=self.beta)(student, teacher)


@dataclass(frozen=True, kw_only=True)
class TeachableGKD(GKD):
    """`Teachable` on every token of the student's own completions."""

    k: int = 10
    name = "teachable"

    def divergence_of(self, state=None):
        return Teachable(self.k, self.beta)


class UntilDrift:
    """The tokens of a completion up to where the models stop to agree: the first token at which the mean top-1 agreement of the
    last `window` tokens is below `least`. A rule of ours after the idea of Prune-OPD (arXiv 2605.07804: a top-k overlap), whose
    equations were not at hand."""

    needs = "both"

    def __init__(self, window: int = 8, least: float = 0.5) -> None:
        self.window, self.least = window, least

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        agreed = torch.where(statistics.mask, statistics.top1_agreement.double(), 1.0)
        padded = torch.nn.functional.pad(agreed, (self.window, 0), value=1.0)
        mean = padded.unfold(-1, self.window, 1)[:, 1:].mean(-1)
        drifted = (mean < self.least).long().cumsum(-1) > 0
        return statistics.mask & ~(drifted & statistics.mask)


@dataclass(frozen=True, kw_only=True)
class UntilDriftGKD(GKD):
    """GKD on the tokens before a completion drifts."""

    window: int = 8
    least: float = 0.5
    name = "until_drift"

    def objective(self, batch=None, state=None) -> Objective:
        divergence = resolve_divergence(self.divergence_of(state))
        selection = UntilDrift(self.window, self.least)
        return Objective((DivergenceTerm(name="direct", divergence=divergence, selection=selection),), self.kd_temperature)


CONTROLS = {method.name: method for method in (Controlled, Suppression, TeachableGKD, UntilDriftGKD)}


def main() -> int:
    from tsdkd import cli

    METHODS.update(CONTROLS)
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

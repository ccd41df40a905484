"""What students learn from each other on the paths that several of them are taught (QR-Distill, 2.5, Eq. 5 to 8)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tsdkd.checks import check_choice

ALIGNMENTS = ("tokens", "characters", "mean")


@dataclass(frozen=True)
class MutualResult:
    """Of one path.

    Attributes:
        loss: Eq. 8's mean over tokens and dimensions, summed over the students, 0-d.
        competence: Eq. 6, `{student: 0-d}`, their sum is 1.
        norm: the root mean square of the projected states, detached, 0-d; it falls where the projections collapse.
    """

    loss: torch.Tensor
    competence: dict[int, torch.Tensor]
    norm: torch.Tensor


def aligned(
    states: Mapping[int, torch.Tensor], how: str, spans: Mapping[int, Sequence[tuple[int, int]]] | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """States of one text by several tokenizers on common places.

    Args:
        states: of each student, `[its tokens, width]`.
        how: `tokens`, one place a token, of students with one tokenizer; `characters`, one place for each piece of the text
            that no student's token divides, with the state of the token that covers it; `mean`, one place, the mean.
        spans: of each student's tokens, the characters from and to, for `characters`.

    Returns:
        the states `[places, width]` each, and the places' weights, whose sum is 1.

    Raises:
        ValueError: tokens that differ in number, or spans that are missing.
    """
    check_choice("how", how, ALIGNMENTS)
    first = next(iter(states.values()))
    if how == "mean":
        return {student: state.mean(0, keepdim=True) for student, state in states.items()}, first.new_ones(1)
    if how == "tokens":
        lengths = {student: len(state) for student, state in states.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"students of other tokenizers have {lengths} tokens of one path: align by characters or by the mean."
            )
        return dict(states), first.new_full((len(first),), 1 / max(1, len(first)))
    if spans is None or set(spans) != set(states):
        raise ValueError("alignment by characters needs each student's spans: take a fast tokenizer, or align by the mean.")
    cuts = sorted({edge for each in spans.values() for span in each for edge in span})
    pieces = [(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]  # noqa: RUF007
    covering = {student: _covering(pieces, each) for student, each in spans.items()}
    kept = [place for place in range(len(pieces)) if all(found[place] is not None for found in covering.values())]
    if not kept:
        raise ValueError("no piece of the path is covered by a token of every student: align by the mean.")
    sizes = first.new_tensor([float(pieces[place][1] - pieces[place][0]) for place in kept])
    index = {s: torch.tensor([found[place] for place in kept], device=first.device) for s, found in covering.items()}
    return {student: state[index[student]] for student, state in states.items()}, sizes / sizes.sum()


def _covering(pieces: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Which token covers each piece; of several with one span the last, which has read them all."""
    starts = [start for start, _ in spans]
    last = [bisect_right(starts, a) - 1 for a, _ in pieces]
    return [token if token >= 0 and spans[token][1] >= b else None for token, (_, b) in zip(last, pieces, strict=True)]


class Mutual(nn.Module):
    """Projections, competence and ensemble of students that may differ in width.

    Args:
        widths: of each student's last hidden states.
        shared: of the space that they are projected to.
        how: how tokens are aligned, see `aligned`.
        normalise: compare directions: each projected state is divided by its root mean square, so that the loss does not fall
            by shrinking. The paper's does not: the least of its Eq. 8 is where all projections are zero; watch `norm`.

    The ensemble keeps its gradient: without it the competence would have none, and nothing would train it.
    """

    def __init__(self, widths: Sequence[int], shared: int = 256, how: str = "characters", normalise: bool = False) -> None:
        super().__init__()
        check_choice("how", how, ALIGNMENTS)
        self.how, self.normalise = how, normalise
        self.projections = nn.ModuleList(nn.Linear(width, shared) for width in widths)
        self.competence = nn.ModuleList(nn.Linear(shared, 1, bias=False) for _ in widths)

    def forward(
        self, states: Mapping[int, torch.Tensor], spans: Mapping[int, Sequence[tuple[int, int]]] | None = None
    ) -> MutualResult:
        """One path that at least two students are taught.

        Args:
            states: of each of them, `[its tokens, its width]`.
            spans: see `aligned`.

        Raises:
            ValueError: fewer than two students.
        """
        if len(states) < 2:
            raise ValueError(f"mutual distillation is between students, and the path has {len(states)}.")
        dtype = next(self.parameters()).dtype
        projected = {student: self.projections[student](state.to(dtype)) for student, state in states.items()}
        scores = torch.cat([self.competence[student](projected[student].mean(0)) for student in projected])  # Eq. 6
        weights = dict(zip(projected, scores.softmax(0), strict=True))
        norm = torch.cat([state.detach().square().mean(-1) for state in projected.values()]).mean().sqrt()
        if self.normalise:
            projected = {s: state * (state.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for s, state in projected.items()}
        placed, places = aligned(projected, self.how, spans)
        ensemble = torch.stack([weights[student] * state for student, state in placed.items()]).sum(0)  # Eq. 7
        losses = [(places * (state - ensemble).square().mean(-1)).sum() for state in placed.values()]
        return MutualResult(torch.stack(losses).sum(), weights, norm)

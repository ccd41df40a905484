"""How rows are put into forward passes that only read: so many rows, or so many tokens, padded or one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.types import Rollouts


@dataclass(frozen=True)
class Batches:
    """Which rows are read together.

    Args:
        rows: of a forward pass.
        tokens: in place of rows, the most tokens of a pass, padding counted; a longer text is read alone.
        padding_free: rows stand one behind the other in one row, each seen by itself alone, and nothing is padded.
        agreed: from the number of passes that this process needs to that which all make; where a model is in shares, every
            process must make as many.
    """

    rows: int = 1
    tokens: int | None = None
    padding_free: bool = False
    agreed: Callable[[int], int] | None = None

    @classmethod
    def of(cls, rows: int | Batches) -> Batches:
        """So many rows."""
        return rows if isinstance(rows, Batches) else cls(rows)

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """The rows of each pass, from their tokens: of like length together, so that little is padded.

        Without `tokens` the number of passes depends on the number of rows alone. An empty group is a pass that is made for the
        other processes' sake.

        Example:
            >>> Batches(2).groups([9, 1, 5]), Batches(tokens=10).groups([9, 1, 5]), Batches(tokens=10).groups([30, 4])
            ([[1, 2], [0]], [[1, 2], [0]], [[1], [0]])
        """
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        if self.tokens is None:
            return [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        made: list[list[int]] = []
        taken = 0
        for row in order:  # from the shortest on, so that each new one is its pass's longest
            together = taken + sizes[row] if self.padding_free else (len(made[-1]) + 1 if made else 1) * sizes[row]
            if not made or together > self.tokens:
                made.append([])
                together = sizes[row]
            made[-1].append(row)
            taken = together
        passes = len(made) if self.agreed is None else self.agreed(len(made))
        return made + [[] for _ in range(passes - len(made))]


NOTHING = Rollouts([[0]], [[0]], [[0]])  # what a pass for the other processes' sake reads


def laid(
    rollouts: Rollouts, padding_free: bool, pad_id: int, device: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor], torch.Tensor]:
    """What a forward pass of these rows takes, ids and mask and what is beside them, and where to read its hidden states,
    flattened (`Rollouts.padded`)."""
    if padding_free:
        ids, positions, where = rollouts.in_one_row(device)
        return (ids, None), {"position_ids": positions}, where
    ids, mask, where = rollouts.padded(pad_id, device)
    return (ids, mask), rollouts.beside(device), where


# Two texts, prompts and completions; the second's states are others where it sees the first.
_PROMPTS, _COMPLETIONS = [[5, 3, 4, 7, 6], [6, 2, 3]], [[2, 4, 5, 3, 7, 2], [4, 7]]


@torch.no_grad()
def check_padding_free(
    hidden: Callable[[Rollouts, Batches], list[torch.Tensor]], role: str, name: str, vocab_size: int
) -> None:
    """Refuse a model whose rows see each other where they stand in one row.

    Args:
        hidden: the model's hidden states of rollouts that are read so.

    Raises:
        ValueError: naming it.
    """
    prompts, completions = ([[i % vocab_size for i in ids] for ids in column] for column in (_PROMPTS, _COMPLETIONS))
    probe = Rollouts(prompts, completions, [[1] * len(ids) for ids in completions])
    alone, together = (torch.cat(hidden(probe, Batches(rows, padding_free=free))) for rows, free in ((1, False), (2, True)))
    error = (alone.float() - together.float()).norm() / alone.float().norm()
    if not error <= max(1e-4, 6 * torch.finfo(alone.dtype).eps):
        raise ValueError(
            f"padding_free=True puts texts one behind the other, and the {role}, {name}, does not keep them apart there: its "
            f"hidden states differ by {error:.2g} of their size from those of each text alone (recurrent layers, or attention "
            "that reads no position_ids). Leave padding_free out."
        )

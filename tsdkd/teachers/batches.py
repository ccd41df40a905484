"""How rows are put into forward passes that only read: so many rows, or so many tokens, padded or one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tsdkd.teachers.heads import experts_of, text_config
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


# Two first texts of one length, a longer one that is read behind each: what it gives must not depend on the first.
_FIRST, _OTHER, _SECOND = [5, 3, 4, 7, 6, 2], [2, 6, 5, 3, 4, 7], [6, 2, 3, 4, 7, 5, 2, 4]
_LONGEST = 4096  # tokens: of a model with a shorter context, texts that are longer together are tried, too


@torch.no_grad()
def check_padding_free(
    hidden: Callable[[Rollouts, Batches], list[torch.Tensor]],
    role: str,
    model: Any,
    vocab_size: int,
    low_precision: bool = False,
) -> None:
    """Refuse a model whose rows see each other where they stand in one row.

    What a text gives behind two others is the same to the bit, whatever its dtype, and that which it gives alone but for
    rounding. In a mixture the sums over an expert's tokens are of other sizes, and differ by their rounding, too. Convolutions
    along a text mix, however little of it a dtype shows.

    Args:
        hidden: the model's hidden states of rollouts that are read so.
        low_precision: it computes in less than float32, whatever its weights are.

    Raises:
        ValueError: naming it.
    """
    config = text_config(model)
    name, context = config._name_or_path or type(model).__name__, getattr(config, "max_position_embeddings", None)
    experts = experts_of(config)
    refused = f"padding_free=True puts texts one behind the other, and the {role}, {name},"

    def last(*texts: list[int]) -> torch.Tensor:
        ids = [[i % vocab_size for i in text] for text in texts]
        rollouts = Rollouts([one[:1] for one in ids], [one[1:] for one in ids], [[1] * (len(one) - 1) for one in ids])
        return hidden(rollouts, Batches(2, padding_free=len(texts) > 1))[-1].float()

    one, other, alone = last(_FIRST, _SECOND), last(_OTHER, _SECOND), last(_SECOND)
    eps = torch.finfo(torch.bfloat16).eps
    among, apart = (float((one - each).norm() / alone.norm()) for each in (other, alone))
    along = any(isinstance(module, torch.nn.Conv1d) for module in model.modules())  # over a text's tokens, and on into the next
    mixed = along or (not torch.equal(one, other) and not (experts and among <= (2 * eps if low_precision else 1e-5)))
    if mixed or not apart <= (6 * eps if low_precision else 1e-4):
        raise ValueError(
            f"{refused} does not keep them apart there: what it makes of a text depends on what stands before, by "
            f"{max(among, apart):.2g} of its size (recurrent layers, or attention that reads no position_ids). Leave "
            "padding_free out."
        )
    if context is None or context > _LONGEST:
        return
    half = list(range(context // 2 + 1))
    try:
        last(half, half)
    except (RuntimeError, IndexError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{refused} reads no more than its context of {context} tokens in a row ({why}). Leave padding_free out."
        ) from error

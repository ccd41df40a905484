"""One model's operands, and the gradients of hidden states, head weight and bias that the chunks add up to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsdkd.fused.tiles_torch import LogitTransform

# Columns that the gradient filter keeps or skips together.
_FILTER_BLOCK = 512

# Rows of the head that a low-precision weight gradient is rounded through at a time.
_VOCAB_SLICE = 16384


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A sharded (DTensor) weight gathered, once per call; any other as it is. The gradient flows back to the shards."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What the products run in: autocast's dtype where it is on, else the head's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@dataclass
class Operands:
    """One model's hidden states and head, ready for products."""

    hidden: torch.Tensor
    weight: torch.Tensor
    transform: LogitTransform

    def project(self, rows: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Hidden states of some tokens times the head, `[rows, vocab]`, into `out`."""
        hidden = self.hidden[rows]
        return torch.mm(hidden, self.weight.t(), out=out[: hidden.shape[0]])

    def scores(self, rows: torch.Tensor, ids: torch.Tensor, work: torch.dtype) -> torch.Tensor:
        """The logits of some ids `[rows, k]` of some tokens: k rows of the head each."""
        products = torch.einsum("nh,nkh->nk", self.hidden[rows], self.weight[ids]).to(work)
        bias = None if self.transform.bias is None else self.transform.bias[ids]
        return LogitTransform(bias, self.transform.scale, self.transform.softcap).apply_(products)


class Gradients:
    """The gradients of hidden states, weight and bias, each only where it is wanted; weight and bias in float32 or better.

    They are held in units of `unit`, so that a token's share of a large step does not underflow in fp16 products.
    """

    def __init__(
        self,
        operands: Operands,
        full_vocab: int,
        wanted: tuple[bool, bool, bool],
        work: torch.dtype,
        smallest: float,
        unit: torch.Tensor,
    ) -> None:
        tokens, size = operands.hidden.shape
        self.operands = operands
        self.smallest = smallest
        self.unit = unit
        self.skipped = self.columns = 0
        vocab = operands.weight.shape[0]
        self.hidden = torch.zeros(tokens, size, dtype=work, device=operands.hidden.device) if wanted[0] else None
        self.weight = torch.zeros(full_vocab, size, dtype=work, device=operands.hidden.device) if wanted[1] else None
        self.bias = torch.zeros(full_vocab, dtype=work, device=operands.hidden.device) if wanted[2] else None
        self._cut = None if self.weight is None else self.weight[:vocab]

    def add_rows(self, rows: slice | torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        """`gradient` `[rows, vocab]` with respect to the products of `rows`, each row to be multiplied by `scale`."""
        scale = (scale / self.unit).unsqueeze(-1)
        weighted = (self.operands.hidden[rows] * scale).to(gradient.dtype)
        for columns in self._columns(gradient):
            part = gradient[:, columns]
            if self.hidden is not None:
                add = (part @ self.operands.weight[columns]).to(self.hidden.dtype) * scale
                if isinstance(rows, slice):
                    self.hidden[rows] += add
                else:
                    self.hidden.index_add_(0, rows, add)
            if self._cut is not None and self._cut.dtype == gradient.dtype:
                self._cut[columns].addmm_(part.t(), weighted)
            elif self._cut is not None:
                for start in range(columns.start, columns.stop, _VOCAB_SLICE):
                    piece = slice(start, min(start + _VOCAB_SLICE, columns.stop))
                    self._cut[piece] += gradient[:, piece].t() @ weighted
        if self.bias is not None:
            self.bias[: gradient.shape[1]] += scale.to(gradient.dtype).t().mm(gradient)[0]

    def _columns(self, gradient: torch.Tensor) -> list[slice]:
        """The columns that the products take: all, or the runs of blocks where some token's gradient reaches `smallest`."""
        vocab = gradient.shape[1]
        if not self.smallest:
            return [slice(0, vocab)]
        largest = torch.maximum(gradient.amax(0), gradient.amin(0).neg_())
        blocks = torch.nn.functional.pad(largest, (0, -vocab % _FILTER_BLOCK)).unflatten(0, (-1, _FILTER_BLOCK)).amax(-1)
        kept: list[slice] = []
        for block, keep in enumerate((blocks >= self.smallest).tolist()):
            start, stop = block * _FILTER_BLOCK, min((block + 1) * _FILTER_BLOCK, vocab)
            if keep and kept and kept[-1].stop == start:
                kept[-1] = slice(kept[-1].start, stop)
            elif keep:
                kept.append(slice(start, stop))
        self.columns += vocab
        self.skipped += vocab - sum(run.stop - run.start for run in kept)
        return kept

    def add_columns(self, rows: torch.Tensor, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """`gradient` `[rows, k]` with respect to the products of the ids `[rows, k]` of some tokens."""
        gradient = gradient / self.unit
        if self.hidden is not None:
            heads = self.operands.weight[ids].to(gradient.dtype)  # [rows, k, hidden]
            self.hidden.index_add_(0, rows, torch.einsum("nk,nkh->nh", gradient, heads))
        if self.weight is not None:
            parts = gradient.unsqueeze(-1) * self.operands.hidden[rows].to(gradient.dtype).unsqueeze(1)
            # ids repeat: index_add_ adds them in any order on a GPU, index_put_ sorts them first
            self.weight.index_put_((ids.flatten(),), parts.flatten(0, 1), accumulate=True)
        if self.bias is not None:
            self.bias.index_put_((ids.flatten(),), gradient.flatten(), accumulate=True)

"""A teacher in this process, whole on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsdkd.teachers.batches import NOTHING, Batches, laid
from tsdkd.teachers.heads import head_of, last_hidden_state
from tsdkd.types import Head, Rollouts


@torch.no_grad()
def hidden_of(
    model: Any,
    rollouts: Rollouts,
    pad_id: int,
    batch_size: int | Batches,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    read: Callable[..., torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """For each row `[L, hidden]`, a model's hidden states that predict the trained tokens, read in such batches.

    `read(ids, mask, **beside)` stands in for the model's own forward.
    """
    sizes = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    batches = Batches.of(batch_size)
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(rollouts)
    model_device = model.get_input_embeddings().weight.device
    for rows in batches.groups(sizes):
        batch = rollouts.rows(rows) if rows else NOTHING
        inputs, more, where = laid(batch, batches.padding_free, pad_id, model_device)
        with autocast():
            states = last_hidden_state(model, *inputs, **more) if read is None else read(*inputs, **more)
        packed = states.flatten(0, 1)[where.to(states.device)].to(device)
        for row, states_of_row in zip(rows, packed.split(batch.lengths) if rows else (), strict=True):
            hidden[row] = states_of_row.clone()  # a view would keep the whole batch alive
    return hidden


class LocalTeacher:
    """Reads rollouts with a model of this process: frozen, in evaluation mode, in the dtype it was loaded in.

    Args:
        model: a causal language model; it is frozen here.
        pad_id: any id of its vocabulary, for padding that no result depends on.
        batch_size: rows per forward pass, or `Batches`.
        device: where the loss is computed; the hidden states are brought there.
        autocast: the mixed-precision context of the forward pass.
    """

    writes = "interleaved"
    is_remote = False

    def __init__(
        self,
        model: Any,
        *,
        pad_id: int,
        batch_size: int | Batches,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if any(p.numel() and not p.untyped_storage().nbytes() and not p.is_meta for p in model.parameters()):
            raise ValueError(
                "this teacher's weights are with another trainer, which swaps them: call its teacher.close() first, or pass "
                "the teacher's name."
            )
        self.model = model.requires_grad_(False).eval()
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.device = device
        self.autocast = autocast

        self._moved: Head | None = None

    @property
    def head(self) -> Head:
        head = head_of(self.model)
        if head.weight.device == self.device:
            return head
        if self._moved is None:  # it is frozen, so one copy serves the whole run
            bias = None if head.bias is None else head.bias.to(self.device)
            self._moved = dataclasses.replace(head, weight=head.weight.to(self.device), bias=bias)
        return self._moved

    def read(self, ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor) -> torch.Tensor:
        """`[rows, longest, hidden]`, the last hidden state of padded rows; `more` is `Rollouts.beside`. Without a mask rows
        stand one behind the other, and `more` is their positions."""
        return last_hidden_state(self.model, ids, mask, **more)

    def read_in(self, rollouts: Rollouts, batches: int | Batches, device: torch.device) -> list[torch.Tensor]:
        """Its hidden states of rollouts that are read in such batches, on a device."""
        return hidden_of(self.model, rollouts, self.pad_id, batches, device, self.autocast, self.read)

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        return self.read_in(rollouts.first(lengths), self.batch_size, self.device)

    def close(self) -> None:
        """Nothing is held beyond the model itself."""

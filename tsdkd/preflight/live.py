"""The bytes of tensors that are alive while operations run, whether they hold memory or none (fake tensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that knows the most bytes that all storages seen held at once.

    Args:
        first: tensors that are there from the start.
    """

    def __init__(self, first: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0  # no more can be alive: what was freed since the last count is still in it
        self.peak = 0
        self._note(first)
        self.now()

    def _note(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self._seen.get(storage._cdata)
                if known is None or known[0].expired():
                    self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._most += storage.nbytes()

    def now(self) -> int:
        """Bytes alive."""
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        self._most = sum(size for _, size in self._seen.values())
        self.peak = max(self.peak, self._most)
        return self._most

    def restart(self) -> int:
        """Begin a new peak; bytes alive."""
        self.peak = 0
        return self.now()

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._note(tree_leaves((args, kwargs, made)))
        if self._most > self.peak:
            self.now()
        return made

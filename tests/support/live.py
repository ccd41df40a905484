"""The bytes of tensors that are alive, counted as operations run: what a device's memory would hold."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes that the storages of all tensors seen held at once, without those that `apart` names.

    Args:
        first: tensors that are there from the start.
        apart: gives storages that do not count (CPU memory, where the run's device is the CPU, too).
    """

    def __init__(self, first=(), apart=lambda: ()):
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}
        self.apart, self.peak = apart, 0
        self._note(first)

    def _note(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen.setdefault(storage._cdata, StorageWeakRef(storage))

    def now(self) -> int:
        left_out = {storage._cdata for storage in self.apart()}
        held = 0
        for key, ref in list(self.seen.items()):
            storage = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self.seen[key]
            elif key not in left_out:
                held += storage.nbytes()
        return held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self._note(tree_leaves((args, kwargs, made)))
        self.peak = max(self.peak, self.now())
        return made

"""A teacher that stands in CPU memory and on the device only while it reads: one GPU, two phases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tsdkd.teachers.local import LocalTeacher
from tsdkd.types import Rollouts

_CPU = torch.device("cpu")


class Parked:
    """Tensors whose memory on their device is given up for a while; a copy in CPU memory, pinned for a GPU, stands for it.

    The tensors stay where and what they are: their storages are emptied and filled again, so that views, tied weights and the
    hooks of `DistributedDataParallel` hold. Between `down` and `up` nothing may read them.

    Args:
        tensors: any; those whose memory is not theirs to give up (mapped files, paged optimizers) are left alone.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._storages = list(_storages(tensors).values())
        self._copies = [_host_memory(storage) for storage in self._storages]
        self.changes = True  # what stands on the device may be newer than the copy

    @classmethod
    def moved(cls, tensors: Iterable[torch.Tensor], device: torch.device) -> Parked:
        """Tensors that never change, from wherever they are to a device, and down at once: no more than one is there at a
        time."""
        made, tied = cls(), dict[int, list[torch.Tensor]]()
        made.changes = False
        for tensor in tensors:
            tied.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        while tied:
            _, own = tied.popitem()
            source = own[0].untyped_storage()
            copy, home = _host_memory(source, device), torch.UntypedStorage(0, device=device)
            copy.copy_(source)
            for tensor in own:
                place = tensor.storage_offset(), tensor.size(), tensor.stride()
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=device).set_(home, *place)
            home.resize_(0)
            made._storages.append(home)
            made._copies.append(copy)
        return made

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether these are the tensors that it was made of."""
        return _storages(tensors).keys() == {storage._cdata for storage in self._storages}

    @property
    def bytes(self) -> int:
        """What is given up of the device's memory."""
        return sum(copy.nbytes() for copy in self._copies)

    def down(self) -> None:
        """Give the device's memory up, its content kept in CPU memory."""
        for storage, copy in zip(self._storages, self._copies, strict=True):
            if not storage.resizable():
                continue  # numpy has looked at it meanwhile: it stays
            if self.changes:
                copy.copy_(storage)
            storage.resize_(0)

    def up(self) -> None:
        """Take the device's memory again, and its content."""
        for storage, copy in zip(self._storages, self._copies, strict=True):
            if not storage.nbytes():
                storage.resize_(copy.nbytes())
                storage.copy_(copy, non_blocking=True)
        for device in {storage.device for storage in self._storages if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # before the copies are written again


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of tensors that can be emptied, each once."""
    found = {(storage := tensor.untyped_storage())._cdata: storage for tensor in tensors}
    return {key: storage for key, storage in found.items() if storage.resizable() and storage.nbytes()}


def _host_memory(like: torch.UntypedStorage, device: torch.device | None = None) -> torch.UntypedStorage:
    pinned = (device or like.device).type == "cuda"
    return torch.empty(like.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()


class SwapTeacher(LocalTeacher):
    """A teacher in this process that takes the device's memory only while it reads, in the place of the student's.

    Its hidden states wait in CPU memory. Its head stays on the device, since the loss reads it.

    Args:
        model: a causal language model, whole, in CPU memory or on the device; it is frozen here.
        room: a context in which the student has given up what it can of the device's memory.
        others: as in `LocalTeacher`.

    Raises:
        ValueError: a model in shares or over several devices.
    """

    writes = "not"

    def __init__(self, model: Any, *, room: Callable[[], AbstractContextManager] = nullcontext, **others: Any) -> None:
        super().__init__(model, **others)
        self.room = room
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(devices) > 1 or any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
            raise ValueError(
                "teacher_placement=swap moves a teacher between CPU memory and one device, and this one is in shares (ZeRO-3) "
                "or over several devices: pass its name, or a model that was loaded whole, or use teacher_placement=zero3."
            )
        head = model.get_output_embeddings()
        stay = [tensor for tensor in (head.weight, getattr(head, "bias", None), *model.buffers()) if tensor is not None]
        for tensor in stay:
            tensor.data = tensor.data.to(self.device)
        kept = {id(tensor) for tensor in stay}
        self._moving = [p for p in model.parameters() if id(p) not in kept]
        self._weights = Parked.moved(self._moving, self.device)

    @property
    def bytes(self) -> int:
        """What it takes of the device's memory while it reads, beside its head."""
        return self._weights.bytes

    @contextmanager
    def up(self) -> Iterator[None]:
        """The teacher on the device, with the student out of its way."""
        with self.room():
            self._weights.up()
            try:
                yield
            finally:
                self._weights.down()

    def close(self) -> None:
        """Give the model its weights back, in CPU memory."""
        self._weights.up()
        for parameter in self._moving:
            parameter.data = parameter.data.to(_CPU, copy=True)
        self._weights, self._moving = Parked(), []

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        with self.up():
            return self.read_in(rollouts.first(lengths), self.batch_size, _CPU)

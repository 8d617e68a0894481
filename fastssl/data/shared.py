"""Shared memory in which worker processes make batches, and from which the main process reads them.

It is taken once and reused in turn, so that no batch is copied on its way and no page is new to the system: torch's own
way is a new file for each tensor, of which every 4 kB page costs a fault in both processes. A worker that is forked
inherits the memory, which then needs no /dev/shm; one that is started anew gets it from torch, in /dev/shm.
"""

import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of a cache line
# bytes of a slot beside the pixels, for numbers, labels and seeds; pages that are never written take no memory
ROOM = 1 << 18

_current = threading.local()  # `slot`: where this worker makes its batch; `pinned`: True if a GPU will copy it
_rings: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


class NoSharedMemory(MemoryError):
    """There is no shared memory for a tensor that does not fit in its slot."""


class Ring:
    """Slots of shared memory for one batch each.

    Args:
        slots: number of batches that exist at a time.
        batch_bytes: size of the pixels of a batch.

    Raises:
        OSError: there is no memory.
    """

    def __init__(self, slots: int, batch_bytes: int):
        self.slots, self._size = slots, -(-(batch_bytes + ROOM) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = torch.frombuffer(mmap.mmap(-1, slots * self._size), dtype=torch.uint8)
        self.number = next(_numbers)
        _rings[self.number] = self

    def slot(self, number: int) -> Tensor:
        """The memory of a slot, [N] uint8."""
        return self._memory[number * self._size : (number + 1) * self._size]

    def make(self, number: int, make: Callable[[], Any]) -> Any:
        """Makes a batch in a slot and returns what the main process needs to find it there; an error as it is.

        Raises:
            NoSharedMemory: the batch is larger than the slot, and there is no shared memory for the rest.
        """
        _current.slot = slot = _Slot(self.slot(number))
        try:
            batch = make()
            return batch if isinstance(batch, Exception) else Sent(self.number, number, map_tensors(slot.send, batch))
        finally:
            del _current.slot


class Place(NamedTuple):
    """Where a tensor lies in a slot."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Sent(NamedTuple):
    """A batch whose tensors lie in a slot."""

    ring: int
    slot: int
    batch: Any  # with a `Place` instead of each tensor

    def open(self) -> Any:
        """The batch, with tensors that are valid until the slot is used again."""
        memory = _rings[self.ring].slot(self.slot)

        def find(place: Place) -> Tensor:
            size = math.prod(place.shape) * place.dtype.itemsize
            return memory[place.begin : place.begin + size].view(place.dtype).view(place.shape)

        return map_tensors(find, self.batch, Place)

    def pin_memory(self) -> Any:
        """The batch in page-locked memory; torch's thread that pins batches calls it."""
        return map_tensors(Tensor.pin_memory, self.open())


class _Slot:
    """A slot that is being filled."""

    def __init__(self, memory: Tensor):
        self._memory, self._used = memory, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Memory of the slot; None if there is no room."""
        begin = -(-self._used // ALIGNMENT) * ALIGNMENT
        end = begin + math.prod(shape) * dtype.itemsize
        if end > len(self._memory):
            return None
        self._used = end
        return self._memory[begin:end].view(dtype).view(tuple(shape))

    def send(self, tensor: Tensor) -> Place | Tensor:
        """The place of a tensor, which is copied into the slot unless it lies there; itself if there is no room."""
        begin = tensor.data_ptr() - self._memory.data_ptr()
        if not (0 <= begin < len(self._memory) and tensor.is_contiguous()):
            copy = self.take(tensor.shape, tensor.dtype)
            if copy is None:
                try:
                    return tensor.share_memory_()
                except (RuntimeError, OSError) as error:
                    raise NoSharedMemory(str(error)) from error
            tensor = copy.copy_(tensor)
            begin = tensor.data_ptr() - self._memory.data_ptr()
        return Place(begin, tuple(tensor.shape), tensor.dtype)


def empty(*shape: int) -> Tensor:
    """A uint8 tensor for pixels of a batch, in the memory in which the batch is handed over, so that it is not copied.

    That is the slot of a worker process, as far as there is room, and page-locked memory in a thread that works for a
    GPU. Elsewhere it is a tensor like any other.
    """
    slot: _Slot | None = getattr(_current, "slot", None)
    tensor = slot.take(shape, torch.uint8) if slot else None
    if tensor is None:
        tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=getattr(_current, "pinned", False))
    return tensor


def pin_in_this_thread() -> None:
    """Makes `empty` give page-locked memory in this thread."""
    _current.pinned = True


def map_tensors(function: Callable[[Any], Any], batch: Any, kind: type = Tensor) -> Any:
    """The batch with each of its tensors, or parts of another kind, replaced by what the function returns."""
    if isinstance(batch, kind):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, part, kind) for key, part in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [map_tensors(function, part, kind) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch

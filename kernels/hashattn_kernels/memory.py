"""Memory that grows with the cache: spare room, so that a new token costs one row, not a copy."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SLACK = 8  # a full buffer grows by an eighth: in the long run a token is copied eight times
STEP = 256  # tokens
HUGE = 4 * 2**20  # bytes from which a buffer asks for huge pages
_MADV_HUGEPAGE = 14  # linux/mman.h


class GrowableBuffer:
    """A tensor that grows along one axis, in place while its capacity lasts.

    `value` is a view of what is stored. Views taken earlier keep their length; they change only
    where the buffer was cropped and written again.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self._buffer: Tensor | None = None

    @classmethod
    def over(cls, buffer: Tensor, length: int, axis: int) -> GrowableBuffer:
        """The first `length` of a buffer that another one reserved: its `room`."""
        made = cls(axis)
        made._buffer, made.length = buffer, length
        return made

    @property
    def value(self) -> Tensor:
        """What is stored, (..., length, ...)."""
        return self.room.narrow(self.axis, 0, self.length)

    @property
    def room(self) -> Tensor:
        """What is stored, with the spare room behind it."""
        if self._buffer is None:
            raise ValueError("nothing is stored yet: append first")
        return self._buffer

    def append(self, part: Tensor) -> None:
        """Add `part` (..., new, ...) at the end; all other axes must agree."""
        self.extend(part.shape, part.dtype, part.device).copy_(part)

    def extend(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised room of this shape (..., new, ...) at the end, for the caller to fill."""
        end = self.length + shape[self.axis]
        if self._buffer is None or self._buffer.shape[self.axis] < end:
            self._grow(shape, dtype, device, capacity(end))
        room = self._buffer.narrow(self.axis, self.length, end - self.length)
        self.length = end
        return room

    def reserve(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Make room for a whole value of this shape."""
        if self._buffer is None or self._buffer.shape[self.axis] < shape[self.axis]:
            self._grow(shape, dtype, device, shape[self.axis])

    def crop(self, length: int) -> None:
        """Drop what is stored after the first `length`."""
        self.length = min(self.length, length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the buffer and its spare room: reorder, repeat or select the batch."""
        if self._buffer is not None:
            self._buffer = change(self._buffer)

    def _grow(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, tokens: int
    ) -> None:
        shape = list(shape)
        shape[self.axis] = tokens
        grown = reserve(shape, dtype, device)
        if self._buffer is not None:
            grown.narrow(self.axis, 0, self.length).copy_(self.value)
        self._buffer = grown


def capacity(tokens: int, step: int = STEP) -> int:
    """Tokens to make room for when `tokens` are needed."""
    return -(-(tokens + tokens // SLACK) // step) * step


def reserve(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; in main memory on huge pages where the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu":
        huge_pages(tensor)
    return tensor


def huge_pages(tensor: Tensor) -> bool:
    """Ask Linux to back a tensor's memory with huge pages; False where that was not possible.

    Scattered reads then miss the TLB less often. Call it before the memory is first written.
    """
    size = tensor.untyped_storage().nbytes()
    if sys.platform != "linux" or size < HUGE:
        return False
    page = 4096
    start = -(-tensor.untyped_storage().data_ptr() // page) * page
    length = (tensor.untyped_storage().data_ptr() + size - start) // page * page
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise(start, length, _MADV_HUGEPAGE) == 0

"""Rows of a file as tensors that nobody has to copy: pages are shared until they are written.

A mapping is private: reading shows the file's pages, which all mappings of all processes share;
what is written goes to pages of the writer's own, and never to the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache

import torch
from torch import Tensor

_MAP_FIXED = 0x10  # linux/mman.h and Darwin's sys/mman.h
_UNCOUNTED = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE


def can_share(device: torch.device) -> bool:
    """Whether rows can be mapped for a device here."""
    systems = ("linux", "darwin")
    return device.type == "cpu" and sys.platform in systems and sys.maxsize > 2**32


def mapped_rows(
    file: int, start: int, shape: tuple[int, ...], dtype: torch.dtype, batch: int, room: int
) -> Tensor | None:
    """A tensor (batch, heads, room, ...) whose first rows of every head are the file's.

    file: its descriptor; shape: (1, heads, rows, ...) of what lies at byte `start`. start, the
    bytes of a head there and those of `room` rows are multiples of the page size. The rows of the
    batch map the same pages. None where the system allows no more mappings.
    """
    heads, row = shape[1], torch.Size(shape[3:]).numel() * dtype.itemsize
    stored, size = shape[2] * row, room * row
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _UNCOUNTED
    # freed with the tensor: unmapping the region unmaps what was placed over it
    region = mmap.mmap(-1, batch * heads * size, flags=flags)
    tensor = torch.frombuffer(region, dtype=dtype).view(batch, heads, room, *shape[3:])
    for place in range(batch * heads):
        address = tensor.data_ptr() + place * size
        if not _map_over(address, stored, file, start + place % heads * stored):
            return None
    return tensor


def _map_over(address: int, length: int, file: int, offset: int) -> bool:
    """Map a part of a file over an address of this process; False where there are too many."""
    allowed = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _UNCOUNTED
    mapped = _mmap()(address, length, allowed, flags, file, offset)
    if mapped != address:
        code = ctypes.get_errno()
        if code == 12:  # ENOMEM, also for more than vm.max_map_count mappings
            return False
        raise OSError(code, os.strerror(code))
    return True


@cache
def _mmap() -> ctypes._CFuncPtr:
    """The C library's mmap: Python's cannot place a mapping."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *numbers)
    return function

"""Reading memory as fast as this machine can: the bound that kernels are compared with."""

from functools import cache

import numpy as np
from torch import Tensor

from .regions import Region, address_of, call_type, report, share_of
from .simd import at_address, kernel

READ_CALL = call_type("words", "size")
GATHER_CALL = call_type("words", "size", "rows", "width")


@kernel
def read_share(data):
    """XOR of this thread's 64-bit words: one pass over memory, no other work."""
    call = at_address(address_of(data), 1, READ_CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    checksum, words = np.uint64(0), at_address(call.words, call.size, np.uint64)[start:stop]
    for i in range(len(words)):  # indices from 0: LLVM makes vectors of it
        checksum ^= words[i]
    report(call.results, call.threads, thread, np.int64(checksum & np.uint64(1)))


@kernel
def gather_share(data):
    """XOR of this thread's rows, `width` words each, which start at words call.rows."""
    call = at_address(address_of(data), 1, GATHER_CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    words = at_address(call.words, call.size, np.uint64)
    rows = at_address(call.rows, call.units, np.int64)
    checksum = np.uint64(0)
    for i in range(start, stop):
        row = words[rows[i] :][: call.width]
        for j in range(len(row)):
            checksum ^= row[j]
    report(call.results, call.threads, thread, np.int64(checksum & np.uint64(1)))


@cache
def _regions() -> tuple[Region, Region]:
    def read_body(data):
        read_share(data)

    def gather_body(data):
        gather_share(data)

    return Region(read_body), Region(gather_body)


def read(tensor: Tensor) -> None:
    """Read a contiguous tensor once, from its first byte to its last."""
    size = tensor.nbytes // 8
    _regions()[0].run(size, tensor.data_ptr(), size)


def gather(tensor: Tensor, rows: np.ndarray, width: int) -> None:
    """Read scattered rows of `width` bytes of a contiguous tensor.

    rows (m,) int64: the byte at which each starts, a multiple of 8.
    """
    starts = rows // 8
    arguments = (tensor.data_ptr(), tensor.nbytes // 8, starts.ctypes.data, width // 8)
    _regions()[1].run(len(starts), *arguments)

"""Parallel regions: one compiled function that every thread runs on its share of the units.

The threads are torch's own, from the OpenMP library it has loaded. After each of torch's operations
they spin for a while, waiting for the next one: threads of another pool would compete with them for
the cores. The GIL is not taken: a region is entered once, with the address of a record as its only
argument. Without that library (not Linux) a pool of Python threads enters it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from struct import pack, unpack

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from .compiled import compiled
from .simd import at_address, kernel

# the head of every call's record; the region's own fields follow
HEAD = [(name, np.int64) for name in ("thread_number", "number", "threads", "units", "results")]
UNDONE = -1  # result of a share that no thread has computed

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def call_type(*numbers: str, real: tuple[str, ...] = ()) -> np.dtype:
    """The record of a region's calls: HEAD, int64 numbers and addresses, float64 `real` numbers."""
    fields = [(name, np.int64) for name in numbers] + [(name, np.float64) for name in real]
    return np.dtype(HEAD + fields)


@intrinsic
def _call_for_number(typing, address):
    """The int that the C function at an address returns."""

    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        function = builder.inttoptr(arguments[0], ir.PointerType(kind))
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), code


@intrinsic
def address_of(typing, pointer):
    """A C pointer as a number."""

    def code(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.intp(types.voidptr), code


@kernel
def share_of(thread_number, number, threads, units):
    """This thread's number and its range of the units, empty if it has nothing to do."""
    if thread_number:
        number = _call_for_number(thread_number)
    if number >= threads:
        return number, 0, 0
    return number, units * number // threads, units * (number + 1) // threads


@kernel
def report(results, threads, number, result):
    """Store a share's result, 0 or more, for `Region.run`."""
    if number < threads:
        at_address(results, threads, np.int64)[number] = result


class Region:
    """A compiled body(address of a call's record), kept on disk, entered without the GIL."""

    def __init__(self, body: Callable[[int], None]) -> None:
        self._compiled = compiled(cfunc, types.void(types.voidptr))(body)
        self._entry = _Entry(self._compiled.address)

    def run(self, units: int, *fields: int, most: int | None = None) -> int:
        """Sum of the results of all shares of units, on at most `most` threads (torch's number).

        fields: of the call's record, in order, after HEAD; real numbers encoded by `real`.
        """
        available = torch.get_num_threads()
        threads = max(1, min(units, available if most is None else min(most, available)))
        results = array("q", (UNDONE,)) * threads
        call = array("q", (0, 0, threads, units, results.buffer_info()[0], *fields))
        if threads > 1:
            self._enter_all(call, threads)
        for number in range(threads):  # one thread, or fewer from OpenMP than requested
            if results[number] == UNDONE:
                call[0], call[1] = 0, number
                self._entry(call.buffer_info()[0])
        return sum(results)

    def _enter_all(self, call: array, threads: int) -> None:
        openmp = _openmp()
        if openmp is not None:
            parallel, call[0] = openmp
            parallel(self._entry, call.buffer_info()[0], threads, 0)
            return
        calls = [array("q", call) for _ in range(threads)]
        for number, record in enumerate(calls):
            record[1] = number
        list(_pool(threads).map(self._entry, [record.buffer_info()[0] for record in calls]))


def real(value: float) -> int:
    """The bits of a double as an int64, for a `real` field of a record."""
    return unpack("q", pack("d", value))[0]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hashattn")


@cache
def _openmp() -> tuple[Callable, int] | None:
    """GOMP_parallel of the OpenMP library that torch runs on, and the address of its function for
    a thread's number. None where that library cannot be found."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    paths = sorted({line.split()[-1] for line in mapped if "libgomp" in line and "torch" in line})
    if not paths:
        return None
    library = ctypes.CDLL(paths[0])
    parallel = library.GOMP_parallel
    parallel.argtypes = (_Entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel, ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value

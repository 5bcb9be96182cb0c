"""Places of rows in the hot set, and reading the missing ones from a file (see hot_set)."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from .regions import Region, address_of, call_type, report, share_of
from .simd import at_address, kernel

_ABSENT, _TOO_MANY = -1, -1  # as in hot_set
_WANTED = -2  # in place of a slot: just found missing
_FAILED = 1 << 40  # what a thread reports that could not read a row
_FEW_PLACES, _FEW_READS = 16384, 64  # below, a second thread costs more than it helps
_NOWAIT = 8  # RWF_NOWAIT of linux/fs.h: only what is in the page cache
_WILLNEED = 3  # POSIX_FADV_WILLNEED

_PLACE = call_type(
    "rows", "asked", "slot_of", "known", "row_in", "used", "room", "hand", "step", "slots",
    "missing", "counts", "heads",
)  # fmt: skip
_READ = call_type("file", "width", "places", "out", "offsets", "vectors", "late", "nowait")

_pread = types.ExternalFunction(
    "pread", types.int64(types.int32, types.int64, types.int64, types.int64)
)
_preadv2 = types.ExternalFunction(
    "preadv2", types.int64(types.int32, types.int64, types.int32, types.int64, types.int32)
)
_advise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)


@kernel
def _place_head(rows, slot_of, row_in, used, hand, head, step, slots, wanted, into):
    """`hot_set._place` of one head: hits, and missing rows or TOO_MANY."""
    missing, pinned = 0, 0
    for i in range(len(rows)):
        row = rows[i]
        if row < 0:
            continue
        slot = slot_of[row]
        if slot >= 0:
            if used[slot] != step:
                used[slot] = step
                pinned += 1
        elif slot == _ABSENT:
            slot_of[row] = _WANTED
            wanted[missing] = row
            missing += 1
    if pinned + missing > len(row_in):
        for i in range(missing):
            slot_of[wanted[i]] = _ABSENT
        return pinned, _TOO_MANY
    at = hand[head]
    for i in range(missing):
        while used[at] != 0:
            if used[at] != step:
                used[at] = 0
            at += 1
            if at == len(row_in):
                at = 0
        if row_in[at] >= 0:
            slot_of[row_in[at]] = _ABSENT
        slot_of[wanted[i]], row_in[at], used[at] = at, wanted[i], step
        into[i] = at
        at = at + 1 if at + 1 < len(row_in) else 0
    hand[head] = at
    for i in range(len(rows)):
        row = rows[i]
        slots[i] = slot_of[row] if row >= 0 else -1
    return pinned, missing


@kernel
def _place_share(data):
    """The heads of this thread."""
    call = at_address(address_of(data), 1, _PLACE)[0]
    number, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    asked, known, room, heads = call.asked, call.known, call.room, call.heads
    hand = at_address(call.hand, heads, np.int64)
    counts = at_address(call.counts, 2 * heads, np.int64)
    for head in range(start, stop):
        counts[head], counts[heads + head] = _place_head(
            at_address(call.rows + 4 * head * asked, asked, np.int32),
            at_address(call.slot_of + 4 * head * known, known, np.int32),
            at_address(call.row_in + 4 * head * room, room, np.int32),
            at_address(call.used + 4 * head * room, room, np.int32),
            hand, head, call.step,
            at_address(call.slots + 4 * head * asked, asked, np.int32),
            at_address(call.missing + 4 * head * asked, asked, np.int32),
            at_address(call.missing + 4 * (heads + head) * asked, asked, np.int32),
        )  # fmt: skip
    report(call.results, call.threads, number, 0)


@kernel
def _read_share(data):
    """The rows of this thread: first those in the page cache, then those that the disk brings."""
    call = at_address(address_of(data), 1, _READ)[0]
    number, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    places = at_address(call.places, call.units, np.int64)
    offsets = at_address(call.offsets, call.units, np.int64)
    late = at_address(call.late, call.units, np.int64)
    vector = at_address(call.vectors + 16 * number, 2, np.int64)  # a struct iovec
    file, width, waiting, failed = np.int32(call.file), call.width, start, 0
    for i in range(start, stop):
        done = np.int64(-1)
        if call.nowait:
            vector[0], vector[1] = call.out + offsets[i], width
            done = _preadv2(file, call.vectors + 16 * number, np.int32(1), places[i] * width,
                            np.int32(_NOWAIT))  # fmt: skip
        if done != width:
            _advise(file, places[i] * width, width, np.int32(_WILLNEED))
            late[waiting] = i
            waiting += 1
    for j in range(start, waiting):
        i, done = late[j], np.int64(0)
        while done < width:
            more = _pread(file, call.out + offsets[i] + done, width - done,
                          places[i] * width + done)  # fmt: skip
            if more <= 0:
                failed = _FAILED
                break
            done += more
    report(call.results, call.threads, number, failed + waiting - start)


@cache
def _regions() -> tuple[Region, Region]:
    def place_body(data):
        _place_share(data)

    def read_body(data):
        _read_share(data)

    return Region(place_body), Region(read_body)


@cache
def _has_nowait() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "preadv2")


def place(
    rows: Tensor, slot_of: Tensor, row_in: Tensor, used: Tensor, hand: Tensor, step: int,
    slots: Tensor, missing: Tensor,
) -> Tensor:  # fmt: skip
    """As `hot_set._place`, a thread for each share of the heads."""
    heads, asked = rows.shape
    counts = torch.zeros((2, heads), dtype=torch.int64)
    addresses = [part.data_ptr() for part in (rows, slot_of, row_in, used, hand, slots, missing)]
    rows_at, slot_of_at, row_in_at, used_at, hand_at, slots_at, missing_at = addresses
    _regions()[0].run(
        heads, rows_at, asked, slot_of_at, slot_of.shape[1], row_in_at, used_at, row_in.shape[1],
        hand_at, step, slots_at, missing_at, counts.data_ptr(), heads,
        most=1 if rows.numel() < _FEW_PLACES else None,
    )  # fmt: skip
    return counts


def read(file: int, width: int, places: Tensor, out: Tensor, offsets: Tensor) -> None:
    """As `hot_set.read_rows`."""
    count, threads = len(places), torch.get_num_threads()
    places, offsets = places.contiguous(), offsets.contiguous()
    vectors, late = np.empty(2 * threads, np.int64), np.empty(count, np.int64)
    read_late = _regions()[1].run(
        count, file, width, places.data_ptr(), out.data_ptr(), offsets.data_ptr(),
        vectors.ctypes.data, late.ctypes.data, int(_has_nowait()),
        most=1 if count < _FEW_READS else None,
    )  # fmt: skip
    if read_late >= _FAILED:
        raise OSError("rows could not be read: the file ends too early, or its disk fails")

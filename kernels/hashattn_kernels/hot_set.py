"""Which rows of a cache lie in fast memory, and reading the others from a file.

A row is what one KV head keeps of one token. Each head has a hot set of its own, whose victims the
second-chance rule finds (the clock of Corbato's paging experiment, 1968, an approximation of least
recently used): a hand goes round the slots, spares a row that was used since its last visit once,
and takes the first that was not. Rows of the running step are never taken.

Decisions are the host's, whatever device holds the rows: they need no more than the lists.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .backends import available
from .memory import capacity

_ABSENT = -1  # in place of a slot: not in the hot set
_TOO_MANY = -1  # in place of a head's missing rows: it asks for more rows than it has slots


@dataclass(frozen=True)
class Placement:
    """slots (heads, m) int32, like the rows that were asked for, -1 for padding; hits, how many
    different rows were there; and the rows that were missing, whose slots wait to be filled: heads,
    rows, into, each (missing,) int64."""

    slots: Tensor
    hits: int
    heads: Tensor
    rows: Tensor
    into: Tensor


class HotSet:
    """The hot set of each of `heads` KV heads: `slots` rows of any number of rows."""

    def __init__(self, heads: int, slots: int) -> None:
        self.slots = slots
        self._slot_of = torch.full((heads, 0), _ABSENT, dtype=torch.int32)
        self._row_in = torch.full((heads, slots), _ABSENT, dtype=torch.int32)
        self._used = torch.zeros((heads, slots), dtype=torch.int32)  # the step; 0 after a visit
        self._hand = torch.zeros(heads, dtype=torch.int64)
        self._step = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.nbytes for table in (self._slot_of, self._row_in, self._used, self._hand))

    def place(self, rows: Tensor) -> Placement | None:
        """Slots of rows (heads, m) int32, -1 for padding, in any order, also several times.

        Rows that are missing take the place of others. None, and none is placed, where a head asks
        for more rows than it has slots.
        """
        self._know(int(rows.max()) + 1 if rows.numel() else 0)
        self._step += 1
        rows, slots = rows.contiguous(), torch.empty(rows.shape, dtype=torch.int32)
        missing = torch.empty((2, *rows.shape), dtype=torch.int32)
        place = _compiled_place if available("numba") else _place
        tables = (self._slot_of, self._row_in, self._used, self._hand)
        hits, counts = place(rows, *tables, self._step, slots, missing).tolist()
        # numpy's small operations take a third of torch's time
        heads = np.repeat(np.arange(len(rows)), [max(0, count) for count in counts])
        parts = [line[:, :count] for line, count in zip(missing.numpy().transpose(1, 0, 2), counts,
                 strict=True) if count > 0]  # fmt: skip
        found = np.concatenate([np.empty((2, 0), np.int32), *parts], axis=1).astype(np.int64)
        heads, found, into = map(torch.from_numpy, (heads, *found))
        if min(counts) < 0:
            self._empty(heads, found, into)
            return None
        return Placement(slots, sum(hits), heads, found, into)

    def forget(self, first: int) -> None:
        """Empty the slots of all rows from number `first` on."""
        gone = self._slot_of[:, first:]
        heads, columns = (gone >= 0).nonzero(as_tuple=True)
        self._empty(heads, first + columns, gone[heads, columns].long())

    def _empty(self, heads: Tensor, rows: Tensor, slots: Tensor) -> None:
        self._slot_of[heads, rows] = _ABSENT
        self._row_in[heads, slots] = _ABSENT
        self._used[heads, slots] = 0

    def _know(self, rows: int) -> None:
        """Have a column of the table for each of `rows` rows."""
        heads, known = self._slot_of.shape
        if known < rows:
            more = torch.full((heads, capacity(rows) - known), _ABSENT, dtype=torch.int32)
            self._slot_of = torch.cat((self._slot_of, more), dim=1)


def _compiled_place(*arguments) -> Tensor:
    from .numba_cpu.rows import place

    return place(*arguments)


def _place(
    rows: Tensor, slot_of: Tensor, row_in: Tensor, used: Tensor, hand: Tensor, step: int,
    slots: Tensor, missing: Tensor,
) -> Tensor:  # fmt: skip
    """Hits and missing rows, or _TOO_MANY, of each head, (2, heads) int64: what `HotSet.place`
    means, row by row."""
    tables = [part.numpy() for part in (rows, slot_of, row_in, used, hand, slots, missing)]
    rows, slot_of, row_in, used, hand, slots, missing = tables
    counts = np.zeros((2, len(rows)), np.int64)
    for head, asked in enumerate(rows.tolist()):
        line = list(dict.fromkeys(row for row in asked if row >= 0))
        if len(line) > row_in.shape[1]:
            counts[1, head] = _TOO_MANY
            continue
        for row in line:
            if slot_of[head, row] >= 0:
                used[head, slot_of[head, row]] = step
                counts[0, head] += 1
        for row in line:
            if slot_of[head, row] >= 0:
                continue
            while used[head, hand[head]] != 0:
                if used[head, hand[head]] != step:
                    used[head, hand[head]] = 0
                hand[head] = (hand[head] + 1) % row_in.shape[1]
            slot = hand[head]
            if row_in[head, slot] >= 0:
                slot_of[head, row_in[head, slot]] = _ABSENT
            slot_of[head, row], row_in[head, slot], used[head, slot] = slot, row, step
            hand[head] = (slot + 1) % row_in.shape[1]
            missing[:, head, counts[1, head]] = row, slot
            counts[1, head] += 1
        slots[head] = np.where(rows[head] < 0, -1, slot_of[head, np.maximum(rows[head], 0)])
    return torch.from_numpy(counts)


def read_rows(file: int, width: int, places: Tensor, out: Tensor, offsets: Tensor) -> None:
    """Read rows of `width` bytes from an open file: number places[i], int64, to out[offsets[i]:],
    uint8 in main memory.

    Rows that the system holds in its page cache are copied; of all others it is told together
    before one is waited for, so that the disk reads several at once. OSError where the file ends
    too early or cannot be read.
    """
    if available("numba"):
        from .numba_cpu.rows import read

        read(file, width, places, out, offsets)
        return
    view = memoryview(out.numpy())
    for place, offset in zip(places.tolist(), offsets.tolist(), strict=True):
        done = os.preadv(file, [view[offset : offset + width]], place * width)
        if done != width:
            raise OSError(f"the file ends within row {place}: it was truncated")

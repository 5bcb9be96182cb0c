"""Rows of one layer of which a hot set lies in fast memory, and all in host memory or a file.

Every token of every sequence of a batch is a record. Sequences that share a beginning, as beams and
copies do, share its records, and so the slots of the hot set: to reorder a batch moves no row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hashattn.attention.cold_rows import ColdRows, FileRows, HostRows, fill
from hashattn.attention.memory import LayerMemory, Traffic
from hashattn.kernels import GrowableBuffer, HotSet

_BLOCK = 4096  # records that are read or written at a time


class OffloadedRows:
    """`slots` rows of `width` bytes of each KV head on a device, the others where Memory says."""

    def __init__(
        self, memory: LayerMemory, kv_heads: int, slots: int, width: int, device: torch.device
    ) -> None:
        self._hot = torch.zeros((kv_heads, slots, width), dtype=torch.uint8, device=device)
        self._placed = HotSet(kv_heads, slots)
        folder, limit = memory.memory.folder, memory.slow_bytes
        cold = (kv_heads, width, limit)
        self._cold: ColdRows = HostRows(*cold) if folder is None else FileRows(folder, *cold)
        self._records = GrowableBuffer(axis=1)  # (B, n) int32: the record of each token
        self._count = 0
        self._in_order = True  # one sequence, whose tokens are records 0, 1, 2, ...

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self._records.length

    @property
    def nbytes(self) -> int:
        """Bytes in fast memory, the tables of places among them."""
        return self._hot.nbytes + self._placed.nbytes + self._records.room.nbytes

    def forget_pages(self) -> None:
        """Ask the system to drop its copies of a file's rows from memory, to measure without."""
        self._cold.forget_pages()

    def append(self, rows: Tensor) -> None:
        """Add rows (B, KV heads, new, width)."""
        batch, kv_heads, new, width = rows.shape
        for part in rows.split(max(1, _BLOCK // batch), dim=2):
            records = part.permute(2, 0, 1, 3).reshape(-1, kv_heads, width)
            self._cold.write(self._count, records.cpu())
            numbers = self._count + torch.arange(len(records), dtype=torch.int32)
            self._records.append(numbers.view(-1, batch).T)
            self._count += len(records)
            self._warm(numbers, records)
        self._in_order &= batch == 1

    def _warm(self, numbers: Tensor, records: Tensor) -> None:
        """Take the last of new records into the hot set."""
        slots = self._hot.shape[1]
        numbers, records = numbers[-slots:], records[-slots:]
        placed = self._placed.place(numbers.expand(len(self._hot), -1))
        first = int(numbers[0])
        rows = records[(placed.rows - first).to(records.device), placed.heads.to(records.device)]
        fill(self._hot, placed.heads, placed.into, rows)

    @torch.no_grad()
    def reach(self, indices: Tensor, traffic: Traffic) -> tuple[Tensor, Tensor]:
        """Rows (B, KV heads, m, width) and their numbers in place of tokens, like indices (B,
        lists, q, m): the hot set, into which the missing ones are fetched; all rows, where a step
        reads more than it holds."""
        wanted, shape = self._by_head(indices)
        placed = self._placed.place(wanted)
        if placed is None:
            rows = torch.cat(list(self.blocks()), dim=2)
            traffic.add(streamed=1, bytes_moved=rows.nbytes)
            return rows.to(self._hot.device), indices
        missing = len(placed.rows)
        start = time.perf_counter()
        if missing:
            self._cold.fetch(placed.heads, placed.rows, self._hot, placed.into)
        traffic.add(
            hits=placed.hits, misses=missing, bytes_moved=missing * self._hot.shape[2],
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        batch = indices.shape[0]
        slots = placed.slots.view(shape).transpose(0, 1).reshape(indices.shape)
        return self._hot.expand(batch, *self._hot.shape), slots.to(indices.device)

    def _by_head(self, indices: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Records (KV heads, rows asked for) of lists (B, lists, q, m), and the shape (KV heads, B,
        lists of a head, q, m) that its second axis has."""
        tokens, kv_heads = indices.cpu(), len(self._hot)
        if not self._in_order:
            table = self._records.value
            flat = tokens.flatten(1).long()
            records = table.gather(1, flat.clamp(min=0))
            tokens = records.masked_fill(flat < 0, -1).view(indices.shape)
        by_head = tokens.unflatten(1, (kv_heads, -1)).transpose(0, 1)
        return by_head.reshape(kv_heads, -1), tuple(by_head.shape)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, in parts (B, KV heads, some tokens, width)."""
        table = self._records.value
        for part in table.split(max(1, _BLOCK // len(table)), dim=1):
            records = self._cold.block(part.reshape(-1).long())
            rows = records.unflatten(0, part.shape).transpose(1, 2)
            yield rows.to(self._hot.device)

    def crop(self, length: int) -> None:
        """Drop the tokens after the first `length`; records that nobody has any more are written
        over."""
        self._records.crop(length)
        table = self._records.value
        self._count = int(table.max()) + 1 if table.numel() else 0
        self._placed.forget(self._count)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to axis 0, the batch."""
        self._records.map(change)
        self._in_order = False

"""Rows that are not in fast memory: in host memory, or in a file without a name.

A record is what all KV heads of a layer keep of one token: (KV heads, width) bytes, rows of K and V
side by side. Records are only appended, and read row by row.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hashattn.base.errors import MemoryLimitError
from hashattn.kernels import GrowableBuffer, read_rows

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STEP = 16 * 2**20  # bytes by which a file grows: it has room, or the error comes before the write


class ColdRows(Protocol):
    """Records (count, KV heads, width) uint8 in the order in which they were appended."""

    def write(self, first: int, records: Tensor) -> None:
        """Store records (new, KV heads, width) from number `first` on, over any stored there."""

    def fetch(self, heads: Tensor, records: Tensor, hot: Tensor, slots: Tensor) -> None:
        """Copy rows of these heads and records into slots of hot (KV heads, slots, width) uint8;
        heads, records and slots (k,) int64."""

    def block(self, records: Tensor) -> Tensor:
        """Whole records (k, KV heads, width) uint8 of these numbers (k,) int64."""


class HostRows:
    """Records in main memory."""

    def __init__(self, kv_heads: int, width: int, limit: int | None) -> None:
        self._shape, self._limit = (kv_heads, width), limit
        self._stored = GrowableBuffer(axis=0)

    def write(self, first: int, records: Tensor) -> None:
        size = (first + len(records)) * self._shape[0] * self._shape[1]
        _within(self._limit, size)
        self._stored.crop(first)
        self._stored.append(records)

    def fetch(self, heads: Tensor, records: Tensor, hot: Tensor, slots: Tensor) -> None:
        fill(hot, heads, slots, self._stored.value[records, heads])

    def block(self, records: Tensor) -> Tensor:
        return self._stored.value[records]


class FileRows:
    """Records in a file that has no name: nobody can open or alter it, and it is gone with the
    process, however that ends."""

    def __init__(
        self, folder: str | os.PathLike, kv_heads: int, width: int, limit: int | None
    ) -> None:
        self._shape, self._limit, self._size = (kv_heads, width), limit, 0
        self._folder = Path(folder)
        self._file = _nameless(self._folder)

    def write(self, first: int, records: Tensor) -> None:
        kv_heads, width = self._shape
        start = first * kv_heads * width
        view = memoryview(records.contiguous().numpy().reshape(-1))
        self._reserve(start + len(view))
        while len(view):
            try:
                done = os.pwrite(self._file, view, start)
            except OSError as error:
                raise self._full(start + len(view)) from error
            view, start = view[done:], start + done

    def fetch(self, heads: Tensor, records: Tensor, hot: Tensor, slots: Tensor) -> None:
        kv_heads, width = self._shape
        places = records * kv_heads + heads
        if hot.is_cpu:
            offsets = (heads * hot.shape[1] + slots) * width
            read_rows(self._file, width, places, hot.view(-1), offsets)
        else:
            fill(hot, heads, slots, self._read(places, width))

    def block(self, records: Tensor) -> Tensor:
        kv_heads, width = self._shape
        return self._read(records, kv_heads * width).view(-1, kv_heads, width)

    def forget_pages(self) -> None:
        """Ask the system to drop the file from its page cache."""
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _read(self, places: Tensor, width: int) -> Tensor:
        out = torch.empty(len(places) * width, dtype=torch.uint8)
        read_rows(self._file, width, places, out, torch.arange(len(places)) * width)
        return out.view(-1, width)

    def _reserve(self, size: int) -> None:
        """Let the file system set aside what is needed, so that a full disk is met here."""
        _within(self._limit, size)
        if size <= self._size:
            return
        wanted = -(-size // _STEP) * _STEP
        if self._limit is not None:
            wanted = min(wanted, self._limit)
        if hasattr(os, "posix_fallocate"):  # not on macOS: there the write meets the full disk
            try:
                os.posix_fallocate(self._file, self._size, wanted - self._size)
            except OSError as error:
                if error.errno in _FULL:
                    raise self._full(size) from error
        self._size = wanted

    def _full(self, size: int) -> MemoryLimitError:
        free = shutil.disk_usage(self._folder).free
        return MemoryLimitError(
            f"a layer's rows of keys and values need {size} bytes in {self._folder}, where "
            f"{free} bytes are free: free some, give Memory another folder, or fewer bits"
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def fill(hot: Tensor, heads: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Copy rows (k, width) into these slots of hot (KV heads, slots, width)."""
    hot[heads.to(hot.device), slots.to(hot.device)] = rows.to(hot.device)


def _nameless(folder: Path) -> int:
    """An open file in a folder, which nobody else can open and the system removes at the end."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except (AttributeError, OSError):  # not Linux, or a file system without such files
        file, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        return file


def _within(limit: int | None, size: int) -> None:
    if limit is not None and size > limit:
        raise MemoryLimitError(
            f"slow_bytes leaves {limit} bytes to a layer, and its keys and values need {size}: "
            "give Memory more slow_bytes or fewer bits, or shorten the context"
        )

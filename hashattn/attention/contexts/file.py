"""The file of a context: safetensors, with a record as JSON, laid out so that it can be mapped.

Any reader of safetensors reads it. The header is padded so that the tensors begin on a page; the
record lists them with their SHA-256, and the header holds the record's own, so that a change of any
byte is found. What is checked when: opening a file checks its header, its size and the record;
`verify` reads all of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hashattn.base.checks import is_count
from hashattn.base.errors import ContextError
from hashattn.base.files import PARTIAL, FileError, parse_json, replacing

FORMAT = 1
PAGE = 1 << 16  # bytes: the largest page that a system of today maps by
_RECORD, _SHA256 = "hashattn_context", "sha256"  # of the header's metadata
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_AGAIN = "copy it again, or read the document again with Context.read and save that"


@dataclass(frozen=True)
class Part:
    """A tensor of the file. make: gives it when it is written, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Part:
        """A tensor that is at hand."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def rows_of_pages(row: int, tokens: int) -> int:
    """The least number of rows of `row` bytes, at least `tokens`, that fills whole pages."""
    step = lcm(row, PAGE) // row
    return -(-tokens // step) * step


class ContextFile:
    """An open file: its record, and its tensors as private mappings. ContextError for a file that
    is truncated, was altered in its header or record, or is no context."""

    def __init__(self, descriptor: int, path: Path | None = None) -> None:
        self.descriptor, self.path = descriptor, path
        weakref.finalize(self, os.close, descriptor)
        size = os.fstat(descriptor).st_size
        header = _read_header(descriptor, size, self._name)
        self.record = _record_of(header, self._name)
        expected, self._places = _header(self.record)
        sizes = (prod(shape) * dtype.itemsize for dtype, shape, _ in self._places.values())
        end = len(expected) + sum(sizes)
        if header != expected:
            raise ContextError(f"{self._name} was altered: {_AGAIN}")
        if size != end:
            raise ContextError(f"{self._name} has {size:,} bytes instead of {end:,}: {_AGAIN}")
        self._bytes = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    @classmethod
    def open(cls, path: str | Path) -> ContextFile:
        """A file by its path; ContextError also where it cannot be opened."""
        path = Path(path)
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
        except (OSError, ValueError) as problem:
            if isinstance(problem, ContextError):
                raise
            what = getattr(problem, "strerror", None) or problem
            raise ContextError(f"{path} cannot be read ({what}): {_AGAIN}") from problem

    @classmethod
    def write(
        cls, path: str | Path | None, record: Mapping[str, Any], parts: Iterable[Part]
    ) -> ContextFile:
        """A new file at a path, whole or not at all (WriteError as `replacing`); None: a file in
        memory without a name, which ends with its last mapping."""
        if path is not None:
            with _new_file(path) as file:
                _write(file, record, parts)
            return cls.open(path)
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("hashattn-context", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as unnamed:
                descriptor = os.dup(unnamed.fileno())
        try:
            with open(descriptor, "wb", buffering=0, closefd=False) as file:
                _write(file, record, parts)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def place(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        """Dtype, shape and first byte of a tensor."""
        return self._places[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor over the file's own pages."""
        dtype, shape, start = self._places[name]
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=start).view(shape)

    def verify(self) -> None:
        """Read everything and compare with the record's hashes, on all cores; ContextError naming
        what was altered."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        stated = {name: entry[_SHA256] for name, entry in self.record["tensors"].items()}
        with ThreadPoolExecutor(cores) as pool:  # hashlib leaves the interpreter to others
            for name, found in zip(stated, pool.map(self._sha256, stated), strict=True):
                if found != stated[name]:
                    raise ContextError(f"{self._name} was altered in {name}: {_AGAIN}")

    def save(self, path: str | Path) -> Path:
        """Write the same file to a path, whole or not at all; WriteError as `replacing`."""
        with _new_file(path) as file:
            _put(file, self._bytes)
        return Path(path)

    def _sha256(self, name: str) -> str:
        dtype, shape, start = self._places[name]
        end = start + prod(shape) * dtype.itemsize
        with memoryview(self._bytes) as content:
            return hashlib.sha256(content[start:end]).hexdigest()

    @property
    def _name(self) -> str:
        return "this context" if self.path is None else str(self.path)


def _write(file: BinaryIO, record: Mapping[str, Any], parts: Iterable[Part]) -> None:
    """Write the tensors, one at a time, then the header with their hashes before them."""
    # rows that are mapped come first, as they are whole pages; then by alignment
    parts = sorted(parts, key=lambda part: (not part.name.endswith(".pairs"), -part.dtype.itemsize))
    entries = {
        part.name: {"dtype": _NAMES[part.dtype], "shape": list(part.shape), _SHA256: 64 * "0"}
        for part in parts
    }
    record = {**record, "format": FORMAT, "tensors": entries}
    file.seek(len(_header(record)[0]))
    for part in parts:
        content = part.make().detach().cpu().contiguous().view(torch.uint8).numpy().data
        entries[part.name][_SHA256] = hashlib.sha256(content).hexdigest()
        _put(file, content)
    file.seek(0)
    _put(file, _header(record)[0])


def _put(file: BinaryIO, content: Any) -> None:
    """Write all bytes; a write of many may be cut short."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _header(
    record: Mapping[str, Any],
) -> tuple[bytes, dict[str, tuple[torch.dtype, tuple[int, ...], int]]]:
    """The first bytes of the file of a record, and where they place its tensors."""
    text = json.dumps(record)  # in its own order, which is that of the tensors
    digest = hashlib.sha256(text.encode()).hexdigest()
    listed: dict[str, Any] = {"__metadata__": {"format": "pt", _RECORD: text, _SHA256: digest}}
    places, start = {}, 0
    for name, entry in record["tensors"].items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        end = start + prod(shape) * dtype.itemsize
        listed[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [start, end]}
        places[name] = dtype, shape, start
        start = end
    content = json.dumps(listed).encode()
    content += b" " * (-(8 + len(content)) % PAGE)
    header = struct.pack("<Q", len(content)) + content
    places = {name: (dtype, shape, len(header) + at) for name, (dtype, shape, at) in places.items()}
    return header, places


def _read_header(descriptor: int, size: int, name: str) -> bytes:
    first = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise ContextError(f"{name} is truncated, or not a context: {_AGAIN}")
    return os.pread(descriptor, 8 + length, 0)


def _record_of(header: bytes, name: str) -> dict[str, Any]:
    """The record in a header; whether the header is that of this record, whose hash it holds, is
    not checked."""
    try:
        text = parse_json(header[8:].decode(), name)["__metadata__"][_RECORD]
        record = parse_json(text, name)
        written, tensors = record["format"], record["tensors"].values()
        sound = all(is_count(size, 0) for entry in tensors for size in entry["shape"])
        if not sound or {entry["dtype"] for entry in tensors} - set(_DTYPES):
            raise KeyError("tensors")
    except (FileError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
        raise ContextError(f"{name} is damaged, or not a context: {_AGAIN}") from problem
    if written != FORMAT:
        raise ContextError(
            f"{name} has format {written!r}, this hashattn reads {FORMAT}: install the hashattn "
            "that wrote it, or read the document again with Context.read"
        )
    return record


@contextmanager
def _new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole (`replacing`). What writers of this path left that
    were killed is cleared away first."""
    _clear_leftovers(Path(os.path.realpath(path)))
    with ExitStack() as held, replacing(path) as partial:
        yield held.enter_context(_locked(partial))  # until it has its name


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """A new file, locked while it is open: a lock ends with its process, however that ends."""
    while True:
        with open(partial, "wb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                    yield file
                    return
            # another writer cleared it away before it was locked: once more


def _clear_leftovers(path: Path) -> None:
    """Remove files of writers that were killed while they wrote to `path`."""
    leftover = re.compile(re.escape(path.name) + r"\.\d+-\d+" + re.escape(PARTIAL))
    with suppress(OSError):
        for other in path.parent.iterdir():
            if leftover.fullmatch(other.name):
                with suppress(OSError), open(other, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
                    other.unlink()

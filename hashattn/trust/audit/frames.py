"""A file of frames that are appended one by one: a killed process loses the one in hand at most.

A frame goes to the operating system in one write before the next begins, so it outlives the
process however that ends; after a power cut the last ones may be missing. Reading stops at a last
frame that was cut off; damage before it is an error.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hashattn.base.files import read_bytes
from hashattn.trust.audit.source import AuditError

_MAGIC = b"hashattn audit 1\n"
_HEAD = struct.Struct("<ciiII")  # kind, token, layer, bytes of content, their crc32
_CHECK = struct.Struct("<I")  # the head's own crc32


class Frame(NamedTuple):
    """kind: one letter, with what `token` and `layer` say of its content (trust.evidence)."""

    kind: bytes
    token: int
    layer: int
    content: bytes


class FrameLog:
    """Appends frames to a new file, or to memory where path is None. size: bytes so far.

    AuditError for a file that exists: one audit never goes over another.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self._memory = bytearray()
        self.size = 0
        if self.path is not None:
            self._create()
        self._write(_MAGIC)

    def append(self, frame: Frame) -> None:
        """Write a frame. AuditError, and nothing of it in the file, where the disk is full."""
        self._write(frame_bytes(frame))

    def content(self) -> bytes:
        """All that was written."""
        return bytes(self._memory) if self.path is None else read_bytes(self.path, AuditError)

    def _create(self) -> None:
        if self.path.exists():
            raise AuditError(
                f"{self.path} exists, and an audit goes over no other: give another path, or "
                "delete it"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("xb").close()
        except OSError as problem:
            raise AuditError(
                f"{self.path} cannot be written ({problem.strerror}): give another path"
            ) from problem

    def _write(self, content: bytes) -> None:
        if self.path is None:
            self._memory += content
        else:
            try:
                with self.path.open("ab", buffering=0) as file:
                    _write_all(file, content, self.size)
            except OSError as problem:
                raise AuditError(
                    f"{self.path}: evidence could not be written ({problem.strerror}), is the disk "
                    f"full? {self.size} bytes of it are kept"
                ) from problem
        self.size += len(content)


def frame_bytes(frame: Frame) -> bytes:
    """A frame as it is stored."""
    kind, token, layer, content = frame
    head = _HEAD.pack(kind, token, layer, len(content), zlib.crc32(content))
    return head + _CHECK.pack(zlib.crc32(head)) + content


def read_frames(content: bytes, where: str) -> Iterator[Frame]:
    """The frames of a log in order, without a last one that was cut off. AuditError naming `where`
    for content that is no such log, or is damaged before its end."""
    if not content.startswith(_MAGIC):
        raise AuditError(f"{where} is not evidence of an audit: give the file that Audit wrote")
    position = len(_MAGIC)
    while position + _HEAD.size + _CHECK.size <= len(content):
        head = content[position : position + _HEAD.size]
        kind, token, layer, length, crc = _HEAD.unpack(head)
        (check,) = _CHECK.unpack_from(content, position + _HEAD.size)
        if zlib.crc32(head) != check:
            if not content[position:].strip(b"\0"):
                return  # room that a file system had reserved
            raise AuditError(f"{where} is damaged at byte {position}: take another copy")
        start = position + _HEAD.size + _CHECK.size
        position = start + length
        if position > len(content):
            return
        body = content[start:position]
        if zlib.crc32(body) != crc:
            if not content[position:].strip(b"\0"):
                return
            raise AuditError(f"{where} is damaged at byte {start}: take another copy")
        yield Frame(kind, token, layer, body)


def _write_all(file: BinaryIO | io.FileIO, content: bytes, before: int) -> None:
    """Write to an unbuffered file of `before` bytes: all, or nothing."""
    rest = memoryview(content)
    try:
        while rest:
            written = file.write(rest)
            rest = rest[written:]
    except OSError:
        file.truncate(before)
        raise

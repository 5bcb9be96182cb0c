"""A results file that survives a kill and that several processes may write at once.

One JSON object a line, each keyed by what it depends on. Processes agree through byte-range locks
on <file>.lock, which the system drops with the process that held them, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hashattn.base.errors import HashAttnError
from hashattn.base.files import FileError, decode, looks_like, parse_json
from hashattn.base.hashes import sha256_text
from hashattn.base.progress import say

_WRITING = 0  # the byte locked while a row is written; every claim locks another one


class ResultLogError(HashAttnError, ValueError):
    """A results file holds something other than results, or cannot be locked or written."""


class _NotJsonError(ResultLogError):
    """A line is not JSON, as a kill may leave the last one."""


class ResultLog:
    """Rows {"key": ..., ...} of a .jsonl file, written one line at a time, once for each key.

    Opening reads what is there. A last line that a kill or a power cut truncated is moved to
    <file>.damaged; a broken line anywhere else raises ResultLogError: no interrupted write leaves
    one. Processes may share a file: `refresh` reads what others added, `claim` divides the work.
    The locks belong to the process: open a file once in each. Use as a context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        self._offset, self._lines = 0, 0  # bytes and lines of the file that are in rows
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._file = stack.enter_context(self.path.open("a+b", buffering=0))
                self._locks = stack.enter_context(open(f"{self.path}.lock", "ab"))
                stack.pop_all()  # close() closes them
        except OSError as error:
            raise ResultLogError(
                f"{self.path} cannot be opened to write results ({error.strerror}): give another "
                "path, of a file"
            ) from error
        try:
            with self._writing():
                self._catch_up()
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any]) -> bool:
        """Writes the row and waits until it is on disk; False if its key was there already.

        Raises ValueError on NaN, KeyError on a row without a key, and ResultLogError if the row
        cannot be written: then nothing of it is left in the file.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self._writing():
            self._catch_up()
            if row["key"] in self.rows:
                return False
            self._write(line.encode())
            self._add_rows(line.encode())
        return True

    def refresh(self) -> None:
        """Reads the rows that other processes added."""
        self._add_rows(self._unread())

    def claim(self, work: str) -> bool:
        """Whether this process may do `work` (a name): no other has claimed it and is alive."""
        byte = 1 + int(sha256_text(work)[:15], 16)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # another process holds it
            return False
        except OSError as error:
            raise self._no_locks(error) from error
        return True

    def close(self) -> None:
        """Closes the file and gives all claims back; rows stay readable."""
        self._file.close()
        self._locks.close()

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        """Writes the whole line to disk after what was read, or nothing of it."""
        try:
            _write_all(self._file, line)
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._offset)
            if not isinstance(error, OSError):
                raise
            raise ResultLogError(
                f"{self.path}: a row could not be written ({error.strerror}), is the disk full? "
                f"Nothing was lost, {len(self.rows)} rows are kept: free some space and run again"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """No other process writes meanwhile."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, _WRITING)
        except OSError as error:
            raise self._no_locks(error) from error
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _WRITING)

    def _no_locks(self, error: OSError) -> ResultLogError:
        return ResultLogError(
            f"{self.path} cannot be locked ({error}), and parallel runs could corrupt it: put the "
            "results on a file system with locks, for example a local disk"
        )

    def _unread(self) -> bytes:
        """What the file holds after the bytes that were read; waits for no other process."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), max(0, size - self._offset), self._offset)

    def _add_rows(self, content: bytes) -> None:
        """Puts the whole lines of `content` into rows."""
        for line in content.split(b"\n")[:-1]:
            row = self._parse(line, self._lines + 1)
            self.rows[row["key"]] = row
            self._offset, self._lines = self._offset + len(line) + 1, self._lines + 1

    def _catch_up(self) -> None:
        """Reads what is new and repairs the end; call with the lock of writers held."""
        content = self._unread()
        if not self._offset and (other := looks_like(content)):
            raise ResultLogError(f"{self.path} looks like {other[0]}: {other[1]}, or delete it")
        end = content.rfind(b"\n") + 1
        last_line = content[: max(0, end - 1)].rfind(b"\n") + 1
        self._add_rows(content[:last_line])
        try:
            self._add_rows(content[last_line:end])
        except _NotJsonError:  # a power cut can garble even a line that has its end
            if not self._offset:
                raise  # nothing says that this is a results file
            end = last_line
        if end < len(content):
            self._move_damaged(content[end:])

    def _move_damaged(self, damaged: bytes) -> None:
        """Moves the end of the file, where no row can be read, to a file beside it."""
        aside = Path(f"{self.path}.damaged")
        try:
            with aside.open("ab", buffering=0) as file:
                _write_all(file, damaged.removesuffix(b"\n") + b"\n")
            self._file.truncate(self._offset)
        except OSError as error:
            raise ResultLogError(
                f"{self.path} ends in a line that was cut off, and it cannot be moved to "
                f"{aside.name} ({error.strerror}): free some space, or delete that line"
            ) from error
        say(f"{self.path}: the last line was cut off; moved to {aside.name}, its sample runs again")

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}:{number}"
        try:
            row = parse_json(decode(line, where, whole=number == 1), where)
        except FileError as error:
            raise _NotJsonError(
                f"{where} is not JSON; delete the line, or the file to start over ({error})"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise ResultLogError(f"{where} has no key; give a results file that evaluate() wrote")
        return row


def _write_all(file: BinaryIO, content: bytes) -> None:
    """Writes all bytes to an unbuffered file, which may take fewer at a time, and to the disk."""
    rest = memoryview(content)
    while rest:
        written = file.write(rest)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]
    os.fsync(file.fileno())

"""A results file that a kill cannot spoil and that several processes may write at once.

One JSON object a line, each keyed by what made it. Processes agree through byte-range locks on
<file>.lock, which the system drops with the process that held them, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from hashattn.errors import HashAttnError
from hashattn.progress import say

WRITING = 0  # the lock's byte of whoever writes; every claim has another one


class ResultLogError(HashAttnError, ValueError):
    """A results file holds something else than whole results, or cannot be locked."""


class _NotJsonError(ResultLogError):
    """A line was not written to its end."""


class ResultLog:
    """Rows {"key": ..., ...} of a .jsonl file, written one line at a time, once for each key.

    Opening reads what is there. A last line that a kill or a power cut spoiled is moved to
    <file>.damaged; a broken line anywhere else raises ResultLogError: that is no interrupted write.
    Processes may share a file: `refresh` reads what others added, `claim` divides the work. The
    locks belong to the process: open a file once in each. Use as a context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        self._read, self._lines = 0, 0  # bytes and lines of the file that are in rows
        self._file = self.path.open("a+b", buffering=0)
        self._locks = open(f"{self.path}.lock", "ab")  # noqa: SIM115, closed by close()
        try:
            with self._writing():
                self._catch_up()
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any]) -> bool:
        """Writes the row and waits until it is on disk; False if its key was there already.

        Raises ValueError on NaN and KeyError on a row without a key.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self._writing():
            self._catch_up()
            if row["key"] in self.rows:
                return False
            self._file.write(line.encode())
            os.fsync(self._file.fileno())
            self._take(line.encode())
        return True

    def refresh(self) -> None:
        """Reads the rows that other processes added."""
        self._take(self._added())

    def claim(self, work: str) -> bool:
        """Whether this process may do `work` (a name): no other has claimed it and is alive."""
        place = 1 + int(hashlib.sha256(work.encode()).hexdigest()[:15], 16)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Nobody else writes meanwhile."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, WRITING)
        except OSError as error:
            raise self._no_locks(error) from error
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, WRITING)

    def _no_locks(self, error: OSError) -> ResultLogError:
        return ResultLogError(
            f"{self.path} cannot be locked ({error}), and parallel runs could spoil it: put the "
            "results on a file system with locks, for example a local disk"
        )

    def _added(self) -> bytes:
        """What was written after the bytes that were read, without waiting for anyone."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), max(0, size - self._read), self._read)

    def _take(self, content: bytes) -> None:
        """Puts the whole lines of `content` into rows."""
        for line in content.split(b"\n")[:-1]:
            row = self._parse(line, self._lines + 1)
            self.rows[row["key"]] = row
            self._read, self._lines = self._read + len(line) + 1, self._lines + 1

    def _catch_up(self) -> None:
        """Reads what is new and repairs the end; nobody else is writing while the lock is held."""
        content = self._added()
        whole = content.rfind(b"\n") + 1
        last = content[: max(0, whole - 1)].rfind(b"\n") + 1
        self._take(content[:last])
        try:
            self._take(content[last:whole])
        except _NotJsonError:  # of a run that was cut off, garbled on its way to the disk
            whole = last
        if whole < len(content):
            self._set_aside(content[whole:])

    def _set_aside(self, damaged: bytes) -> None:
        """Moves the end of the file, where no row can be read, to a file beside it."""
        aside = Path(f"{self.path}.damaged")
        with aside.open("ab") as kept:
            kept.write(damaged.removesuffix(b"\n") + b"\n")
        self._file.truncate(self._read)
        say(f"{self.path}: the last line was cut off; moved to {aside.name}, its sample runs again")

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _NotJsonError(
                f"{self.path}:{number} is not JSON; delete the line, or the file to start over"
            ) from error
        if not isinstance(row, dict) or "key" not in row:
            raise ResultLogError(
                f"{self.path}:{number} has no key; give a results file that evaluate() wrote"
            )
        return row

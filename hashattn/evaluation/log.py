"""A results file that a kill cannot spoil: one JSON object a line, each keyed by what made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from hashattn.errors import HashAttnError


class ResultLogError(HashAttnError, ValueError):
    """A results file holds something else than whole results."""


class ResultLog:
    """Rows {"key": ..., ...} of a .jsonl file, written one flushed line at a time.

    Opening reads what is there; a last line that was cut off by a kill is dropped from the file.
    A broken line anywhere else raises ResultLogError: that is damage, not an interrupted write.
    Later rows win over earlier ones of the same key. Use as a context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        good = self._read() if self.path.exists() else 0
        self._file = self.path.open("ab")
        self._file.truncate(good)

    def append(self, row: dict[str, Any]) -> None:
        """Writes the row and waits until it is on disk; ValueError on NaN or a missing key."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self.rows[row["key"]] = row
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; rows stay readable."""
        self._file.close()

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> int:
        """Fills rows and returns how many bytes of the file are whole lines."""
        content = self.path.read_bytes()
        good = content.rfind(b"\n") + 1  # a line without its end was being written
        for number, line in enumerate(content[:good].splitlines(), 1):
            row = self._parse(line, number)
            self.rows[row["key"]] = row
        return good

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ResultLogError(
                f"{self.path}:{number} is not JSON; delete the line, or the file to start over"
            ) from error
        if not isinstance(row, dict) or "key" not in row:
            raise ResultLogError(
                f"{self.path}:{number} has no key; give a results file that evaluate() wrote"
            )
        return row

"""Progress of long work: a bar, and lines worth keeping.

Both go to stderr, or to the file that HASHATTN_PROGRESS names: `make reproduce` sets it for the
kernels it starts and shows the file in its terminal, since a bar inside a notebook would be stored.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

VARIABLE = "HASHATTN_PROGRESS"
MARK = "* "  # begins a line that say() wrote


class _AppendedFile:
    """A text stream that holds no file open between writes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, text: str) -> int:
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
            file.write(text)  # no run should end for its progress: a full disk costs a bar
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def progress_stream() -> TextIO | _AppendedFile:
    """Where progress belongs: the driver's file under `make reproduce`, else stderr."""
    path = os.environ.get(VARIABLE)
    return _AppendedFile(path) if path else sys.stderr


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar on progress_stream(); tqdm's own arguments."""
    return tqdm(*arguments, file=progress_stream(), **options)


def say(message: str) -> None:
    """Add a line to progress_stream() that outlives the bar."""
    stream = progress_stream()
    stream.write(f"\n{MARK}{message}\n")
    stream.flush()

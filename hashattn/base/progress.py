"""Progress of long work: a bar, and lines worth keeping.

Both go to stderr, or to the file that HASHATTN_PROGRESS names: `make reproduce` sets it for the
kernels it starts and shows the file in its terminal, since a bar inside a notebook would be stored.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
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
    """A tqdm bar on progress_stream(), or where report_to() says; tqdm's own arguments."""
    if _report is not None:
        return _ReportedBar(*arguments, file=io.StringIO(), **options)
    return tqdm(*arguments, file=progress_stream(), **options)


def say(message: str) -> None:
    """Add a line to progress_stream() that outlives the bar."""
    if _report is not None:
        _report(message)
        return
    stream = progress_stream()
    stream.write(f"\n{MARK}{message}\n")
    stream.flush()


Report = str | tuple[int, dict[str, Any] | None]  # a line, or a bar's number and state (None: over)
_report: Callable[[Report], None] | None = None


def report_to(send: Callable[[Report], None]) -> None:
    """Bars and lines of this process go to `send` from now on, for another process to show
    (ReportedProgress)."""
    global _report
    _report = send


class _ReportedBar(tqdm):
    """A bar that another process draws."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Instead of drawing."""
        shown = self.format_dict
        _report((id(self), {name: shown[name] for name in ("prefix", "n", "total", "unit")}
                 | {"postfix": self.postfix}))  # fmt: skip

    def close(self) -> None:
        """See tqdm."""
        drawn = not getattr(self, "disable", True)  # as tqdm asks: it may not have begun
        super().close()
        if drawn:
            _report((id(self), None))


class ReportedProgress:
    """Shows what other processes report; bars that run at the same time have a line each on a
    terminal, and follow one another elsewhere."""

    def __init__(self) -> None:
        self._bars: dict[tuple[int, int], tqdm] = {}

    def show(self, sender: int, report: Report) -> None:
        """One report of a process."""
        if isinstance(report, str):
            say(report)
            return
        number, state = report
        key = (sender, number)
        if state is None:
            self._bars.pop(key).close()
            return
        if key not in self._bars:
            lines = progress_stream() is sys.stderr and sys.stderr.isatty()
            place = {} if lines else {"position": 0}
            self._bars[key] = progress_bar(
                total=state["total"], desc=state["prefix"], unit=state["unit"], **place
            )
        bar = self._bars[key]
        if state["postfix"]:
            bar.set_postfix_str(state["postfix"], refresh=False)
        bar.update(state["n"] - bar.n)

    def close(self) -> None:
        """Leaves the bars as they are; no more reports come."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

"""Progress of long work: a bar, and lines worth keeping.

Both go to stderr, or to the file that HASHATTN_PROGRESS names: `make reproduce` sets it for the
notebooks' kernels and shows the file in its terminal, since a notebook would store the bar.
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
    """A text stream that keeps no file open between writes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, text: str) -> int:
        # a full disk costs the bar, not the run
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing: every write closes the file."""


def _progress_stream() -> TextIO | _AppendedFile:
    """Where progress belongs: the driver's file under `make reproduce`, else stderr."""
    path = os.environ.get(VARIABLE)
    return _AppendedFile(path) if path else sys.stderr


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar on _progress_stream(), or where report_to() says; tqdm's own arguments."""
    if _report is not None:
        return _ReportedBar(*arguments, file=io.StringIO(), **options)
    return tqdm(*arguments, file=_progress_stream(), **options)


def say(message: str) -> None:
    """Add a line to _progress_stream() that outlives the bar."""
    if _report is not None:
        _report(message)
        return
    stream = _progress_stream()
    stream.write(f"\n{MARK}{message}\n")
    stream.flush()


Report = str | tuple[int, dict[str, Any] | None]  # a line, or a bar's id and state (None: closed)
_report: Callable[[Report], None] | None = None


def report_to(send: Callable[[Report], None]) -> None:
    """From now on, send this process's bars and lines to `send`, for another process to show
    (ReportedProgress)."""
    global _report
    _report = send


class _ReportedBar(tqdm):
    """A bar that another process draws."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Reports the state, where tqdm draws it."""
        state = self.format_dict
        _report((id(self), {name: state[name] for name in ("prefix", "n", "total", "unit")}
                 | {"postfix": self.postfix}))  # fmt: skip

    def close(self) -> None:
        """See tqdm."""
        shown = not getattr(self, "disable", True)  # absent where tqdm's __init__ has failed
        super().close()
        if shown:
            _report((id(self), None))


class ReportedProgress:
    """Shows what other processes report. On a terminal, bars that run at the same time have a line
    each; elsewhere they follow one another."""

    def __init__(self) -> None:
        self._bars: dict[tuple[int, int], tqdm] = {}

    def show(self, sender: int, report: Report) -> None:
        """Show one report of a process."""
        if isinstance(report, str):
            say(report)
            return
        number, state = report
        key = (sender, number)
        if state is None:
            self._bars.pop(key).close()
            return
        if key not in self._bars:
            on_terminal = _progress_stream() is sys.stderr and sys.stderr.isatty()
            position = {} if on_terminal else {"position": 0}
            self._bars[key] = progress_bar(
                total=state["total"], desc=state["prefix"], unit=state["unit"], **position
            )
        bar = self._bars[key]
        if state["postfix"]:
            bar.set_postfix_str(state["postfix"], refresh=False)
        bar.update(state["n"] - bar.n)

    def close(self) -> None:
        """Leave the bars as they are: there are no more reports."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

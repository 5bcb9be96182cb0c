"""What a long cell is doing, shown in the terminal of `make reproduce` and nowhere else.

Work in a kernel writes its progress to a small file (base.progress); the driver shows the newest
bar, and prints the lines of say() to stay.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from hashattn.base.files import FileError, read_json
from hashattn.base.progress import MARK


def last_line(path: Path, size: int = 4096) -> str:
    """The newest line of a progress file; carriage returns separate a bar's updates."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def cells_done(partial: Path) -> str:
    """`3/12`: executed of all code cells of a running notebook, "" while it is being written."""
    try:
        cells = read_json(partial)["cells"]
    except FileError:
        return ""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return f"{sum(cell['execution_count'] is not None for cell in code)}/{len(code)}"


class Heartbeat:
    """Shows a running notebook's seconds, cells and innermost progress bar until it exits.

    On a terminal one line is rewritten every second; in a log a line is added every `pause`
    seconds.
    """

    def __init__(self, name: str, partial: Path, progress: Path, pause: float = 30) -> None:
        self.name, self.partial, self.progress = name, partial, progress
        self.live = sys.stderr.isatty()
        self.pause = 1 if self.live else pause
        self.read = 0  # bytes of the progress file read so far
        self.rest = b""  # of them, the last line, still incomplete
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self.start = time.monotonic()
        self.progress.unlink(missing_ok=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()
        self._print_kept_lines()
        self.progress.unlink(missing_ok=True)
        sys.stderr.write(self._clear())

    def _run(self) -> None:
        while not self.done.wait(self.pause):
            self._print_kept_lines()
            seconds = time.monotonic() - self.start
            parts = [f"{self.name}: {seconds:.0f} s", f"cells {cells_done(self.partial)}"]
            line = "  ".join([*parts, last_line(self.progress)])[:100]
            sys.stderr.write(f"{self._clear()}{line}" if self.live else f"{line}\n")
            sys.stderr.flush()

    def _print_kept_lines(self) -> None:
        """Lines that say() added since the last look, each printed once."""
        if not self.progress.is_file():
            return
        with open(self.progress, "rb") as file:
            file.seek(self.read)
            added = file.read()
        self.read += len(added)
        *lines, self.rest = (self.rest + added).replace(b"\r", b"\n").split(b"\n")
        for line in (line.decode(errors="replace") for line in lines):
            if line.startswith(MARK):
                sys.stderr.write(f"{self._clear()}{self.name}: {line.removeprefix(MARK)}\n")

    def _clear(self) -> str:
        """The escape sequence that clears a terminal's line; "" in a log."""
        return "\r\x1b[K" if self.live else ""

"""What a committed notebook must look like: nbval checks every cell, diffs stay small."""

from __future__ import annotations

import re
from typing import Any

MAX_LINES = 25
PROGRESS = re.compile(r"\d+%\|.*\||\bit/s\b|\bs/it\b|examples/s")
ADDRESS = re.compile(r"<[^<>]*\bat 0x[0-9a-f]+>")
INJECTED = "injected-parameters"


def problems(notebook: Any) -> list[str]:
    """Every reason not to commit `notebook` (nbformat version 4); empty when it is clean."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("execution counts are not 1..N: run it from the top (make reproduce store)")
    tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
    if tags.count("parameters") != 1:
        found.append("exactly one cell must be tagged parameters")
    if INJECTED in tags:
        found.append("it was run with injected parameters: store a run without them")
    if "nbval-skip" in tags:
        found.append("nbval-skip hides a cell from the tests: use nbval-ignore-output")
    for number, cell in enumerate(code, start=1):
        found += [f"cell {number}: {problem}" for problem in _cell_problems(cell)]
    return found


def _cell_problems(cell: Any) -> list[str]:
    found = []
    lines = cell.source.splitlines()
    if len(lines) > MAX_LINES:
        found.append(f"{len(lines)} lines, at most {MAX_LINES}")
    if cell.source.rstrip().endswith(";"):
        found.append("a trailing ; does not silence output under nbval: end with plt.show()")
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"error output ({output.ename})")
        if output.get("name") == "stderr":
            found.append("output on stderr")
        text = _text(output)
        if PROGRESS.search(text):
            found.append("a progress bar in the output")
        if ADDRESS.search(text):
            found.append("a memory address in the output, which no other run repeats")
    return found


def _text(output: Any) -> str:
    data = output.get("data", {})
    return output.get("text", "") + data.get("text/plain", "")

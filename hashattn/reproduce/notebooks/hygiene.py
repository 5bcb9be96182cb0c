"""What a committed notebook must look like, so that nbval checks each cell and diffs are small."""

from __future__ import annotations

import re
from typing import Any

_MAX_LINES = 25
_PROGRESS = re.compile(r"\d+%\|.*\||\bit/s\b|\bs/it\b|examples/s")
_ADDRESS = re.compile(r"<[^<>]*\bat 0x[0-9a-f]+>")
_INJECTED = "injected-parameters"


def problems(notebook: Any) -> list[str]:
    """Every reason not to commit `notebook` (nbformat version 4); empty when it is clean."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    reasons = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        reasons.append("execution counts are not 1..N: run it from the top (make reproduce store)")
    tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
    if tags.count("parameters") != 1:
        reasons.append("exactly one cell must be tagged parameters")
    if _INJECTED in tags:
        reasons.append("it was run with injected parameters: store a run without them")
    if "nbval-skip" in tags:
        reasons.append("nbval-skip hides a cell from the tests: use nbval-ignore-output")
    for number, cell in enumerate(code, start=1):
        reasons += [f"cell {number}: {problem}" for problem in _cell_problems(cell)]
    return reasons


def _cell_problems(cell: Any) -> list[str]:
    reasons = []
    lines = cell.source.splitlines()
    if len(lines) > _MAX_LINES:
        reasons.append(f"{len(lines)} lines, at most {_MAX_LINES}")
    if cell.source.rstrip().endswith(";"):
        reasons.append("a trailing ; does not silence output under nbval: end with plt.show()")
    for output in cell.outputs:
        if output.output_type == "error":
            reasons.append(f"error output ({output.ename})")
        if output.get("name") == "stderr":
            reasons.append("output on stderr")
        text = _text(output)
        if _PROGRESS.search(text):
            reasons.append("a progress bar in the output")
        if _ADDRESS.search(text):
            reasons.append("a memory address in the output, which no other run repeats")
    return reasons


def _text(output: Any) -> str:
    data = output.get("data", {})
    return output.get("text", "") + data.get("text/plain", "")

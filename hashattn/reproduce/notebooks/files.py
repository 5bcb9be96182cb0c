"""The layout of a results folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hashattn.base.files import PARTIAL, FileError, read_json

_NO_RESULTS = {"state", ".lock", "progress.txt", "manifest.json", "report.html"}  # about the run


def read_or_none(path: Path) -> Any:
    """The JSON value in `path`; None if the file is missing or damaged."""
    try:
        return read_json(path)
    except FileError:
        return None


def produced_files(results: Path) -> list[Path]:
    """Every file of a results folder that is a result, in name order."""
    if not results.is_dir():
        return []
    return sorted(
        path
        for path in results.rglob("*")
        if path.is_file()
        and path.relative_to(results).parts[0] not in _NO_RESULTS
        and not path.name.endswith((PARTIAL, ".tmp", ".partial.ipynb"))
    )

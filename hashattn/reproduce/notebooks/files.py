"""Files of a reproduction: hashes, and the layout of a results folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hashattn.base.files import PARTIAL, FileError, read_json

KEPT_OUT = {".lock", "progress.txt", "manifest.json", "report.html"}  # about results, not results


def read_kept(path: Path) -> Any:
    """The JSON value in `path`, or None where there is none or it is damaged."""
    try:
        return read_json(path)
    except FileError:
        return None


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path, paths: Iterable[Path]) -> str:
    """One hash of the names (relative to `root`) and contents of `paths`, in name order."""
    lines = (f"{path.relative_to(root).as_posix()} {sha256_file(path)}" for path in sorted(paths))
    return sha256_text("\n".join(lines))


def produced_files(results: Path) -> list[Path]:
    """Every file of a results folder that is a result, in name order."""
    if not results.is_dir():
        return []
    return sorted(
        path
        for path in results.rglob("*")
        if path.is_file()
        and path.relative_to(results).parts[0] not in KEPT_OUT | {"state"}
        and not path.name.endswith((PARTIAL, ".tmp", ".partial.ipynb"))
    )

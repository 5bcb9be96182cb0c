"""Files of a reproduction: atomic writes, hashes, and the layout of a results folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEPT_OUT = {".lock", "progress.txt", "manifest.json", "report.html"}  # about results, not results


def write_atomic(path: Path, text: str) -> Path:
    """Write `text` so that a kill leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`value` as indented JSON with sorted keys, written atomically."""
    return write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in `path`, or None where there is none or a kill left it damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
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
        and not path.name.endswith((".tmp", ".partial.ipynb"))
    )

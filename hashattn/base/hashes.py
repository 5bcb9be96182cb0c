"""SHA-256, in hex, of texts, files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_text(text: str) -> str:
    """Of a text, encoded as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path, paths: Iterable[Path]) -> str:
    """One hash of the names (relative to `root`) and contents of `paths`, in name order."""
    lines = (f"{path.relative_to(root).as_posix()} {sha256_file(path)}" for path in sorted(paths))
    return sha256_text("\n".join(lines))

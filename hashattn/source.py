"""The source files of hashattn and its kernels, as a hash: what a result was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def packages() -> tuple[Path, Path]:
    """The folders of hashattn and of hashattn_kernels."""
    import hashattn_kernels

    return Path(__file__).parent, Path(hashattn_kernels.__file__).parent


def sources_sha256(paths: Iterable[Path] | None = None) -> str:
    """SHA-256 over names and contents of source files in these folders, by default of all."""
    digest = hashlib.sha256()
    kept = None if paths is None else set(paths)
    for package in packages():
        for path in sorted(package.rglob("*.py")):
            if kept is None or path in kept:
                digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()

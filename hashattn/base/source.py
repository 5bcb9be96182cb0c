"""The source files of hashattn and its kernels, and their hash: the code behind a result."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path


def packages() -> tuple[Path, Path]:
    """The folders of hashattn and of hashattn_kernels."""
    import hashattn_kernels

    return Path(__file__).parents[1], Path(hashattn_kernels.__file__).parent


def sources(
    folders: Sequence[Path] | None = None, without: Collection[str] = ()
) -> Iterator[tuple[Path, Path]]:
    """(folder, path) of every source file in `folders`, by default hashattn's and its kernels'.

    without: files and folders to leave out of the first folder, by their paths in it.
    """
    folders = packages() if folders is None else folders
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            left_out = any(path.is_relative_to(folder / name) for name in without)
            if folder != folders[0] or not left_out:
                yield folder, path


def sources_sha256(folders: Sequence[Path] | None = None, without: Collection[str] = ()) -> str:
    """SHA-256 over names and contents of the files that `sources` gives."""
    digest = hashlib.sha256()
    for folder, path in sources(folders, without):
        content = path.read_bytes()
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()

"""Where compiled kernels are kept, and a word on screen while they are made.

numba ties a function's cached code to the file that holds the function alone; a change in a file it
calls into would leave stale code. The cache folder therefore carries a hash of all files.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import config, event

_said = False


@cache
def cache_folder() -> str | None:
    """NUMBA_CACHE_DIR, else hashattn/<hash of this package> in the user's cache folder.

    None if that cannot be written: kernels are then compiled for each process anew.
    """
    if config.CACHE_DIR:
        return config.CACHE_DIR
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "hashattn" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


def compiled(compiler: Callable[..., Any], *arguments: Any, **options: Any) -> Callable:
    """A decorator: compiler(*arguments, **options) of numba, with its code kept in that folder."""
    folder = cache_folder()

    def decorate(function: Callable) -> Any:
        if folder is None:
            return compiler(*arguments, **options)(function)
        before, config.CACHE_DIR = config.CACHE_DIR, folder
        try:
            return compiler(*arguments, cache=True, **options)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


class _Announcer(event.Listener):
    """Says once in a process that kernels are being compiled."""

    def on_start(self, happening: event.Event) -> None:
        global _said
        module = happening.data["dispatcher"].py_func.__module__
        if module.startswith(__package__) and not _said:
            _said = True
            print(
                "hashattn: compiling CPU kernels for this processor, about 10 seconds for each "
                f"head size and dtype, {_kept()}",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, happening: event.Event) -> None:
        """Nothing to say."""


def _kept() -> str:
    folder = cache_folder()
    return f"once; kept in {folder}" if folder else "in every process: no cache folder is writable"


event.register("numba:compile", _Announcer())

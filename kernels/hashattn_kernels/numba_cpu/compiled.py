"""Where compiled kernels are kept, and a line on the screen while they are compiled.

numba checks a function's cached code only against the file that holds the function; a change in a
file that it calls into would leave stale code. So the cache folder is named by a hash of all files.
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

_announced = False


@cache
def cache_folder() -> str | None:
    """NUMBA_CACHE_DIR, else hashattn/<hash of the kernels' sources> in the user's cache folder.

    None if that cannot be written: every process then compiles the kernels again.
    """
    if config.CACHE_DIR:
        return config.CACHE_DIR
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    # constants of the modules beside this package are compiled in
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "hashattn" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


def compiled(compiler: Callable[..., Any], *arguments: Any, **options: Any) -> Callable:
    """A decorator: numba's compiler(*arguments, **options), its code kept in `cache_folder`."""
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

    def on_start(self, compilation: event.Event) -> None:
        global _announced
        module = compilation.data["dispatcher"].py_func.__module__
        if module.startswith(__package__) and not _announced:
            _announced = True
            print(
                "hashattn: compiling CPU kernels for this processor, about 10 seconds for each "
                f"head size and dtype, {_how_often()}",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, compilation: event.Event) -> None:
        """Nothing to say."""


def _how_often() -> str:
    folder = cache_folder()
    return f"once; kept in {folder}" if folder else "in every process: no cache folder is writable"


event.register("numba:compile", _Announcer())

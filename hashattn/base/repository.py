"""The checkout whose data/ every module reads: HASHATTN_HOME, else the one this file lies in."""

from __future__ import annotations

import os
from pathlib import Path

from hashattn.base.errors import HashAttnError


class RepositoryError(HashAttnError, FileNotFoundError):
    """There is no checkout of the repository where it was looked for."""


def repository() -> Path:
    """The checkout's folder, absolute; RepositoryError if it has no data/profiles."""
    root = Path(os.environ.get("HASHATTN_HOME") or Path(__file__).parents[2]).resolve()
    if not (root / "data" / "profiles").is_dir():
        raise RepositoryError(
            f"no data/profiles in {root}: run from a checkout of the repository, or set "
            "HASHATTN_HOME to one"
        )
    return root

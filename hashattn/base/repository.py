"""Two folders: the checkout whose data/ every module reads, and the cache of models."""

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


def cache_folder() -> Path:
    """Where models are kept that were fetched or dequantised: HASHATTN_CACHE, else hashattn/models
    in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    if named := os.environ.get("HASHATTN_CACHE"):
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "hashattn" / "models"

"""Where an evaluation's cells and a hash training's layers are computed: here, or on Ray.

HASHATTN_ENGINE names one: "in_process" (the default) or "ray". Results are the same.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from hashattn.base.checks import require_one_of
from hashattn.base.engines.base import RETRY, Engine, EngineError, InProcess

_ENGINES = ("in_process", "ray")
VARIABLE = "HASHATTN_ENGINE"

__all__ = [
    "RETRY",
    "Engine",
    "EngineError",
    "InProcess",
    "chosen_engine",
    "require_engine",
]


def chosen_engine(name: str | None = None) -> Engine:
    """The engine called `name`, by default HASHATTN_ENGINE's; EngineError if there is none."""
    if require_engine(name) == "ray":
        from hashattn.base.engines.on_ray import RayEngine

        return RayEngine()
    return InProcess()


def require_engine(name: str | None = None) -> str:
    """The engine's name, by default HASHATTN_ENGINE's; EngineError if unknown or not installed."""
    name = name or os.environ.get(VARIABLE) or _ENGINES[0]
    require_one_of(VARIABLE, name, _ENGINES, EngineError)
    if name == "ray" and not _importable("ray"):
        raise EngineError(
            f"{VARIABLE} = 'ray' needs the package ray: pip install '.[ray]', or leave it unset"
        )
    return name


def _importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a stand-in among sys.modules, which has no spec
        return False

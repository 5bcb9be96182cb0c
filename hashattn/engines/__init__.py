"""Where cells of an evaluation and layers of a hash training are computed: here, or on Ray.

The environment's ENGINE says which: "in_process" (the default) or "ray". Results are the same.
"""

from __future__ import annotations

import os

from hashattn.engines.base import LATER, Engine, EngineError, InProcess

ENGINES = ("in_process", "ray")

__all__ = ["ENGINES", "LATER", "Engine", "EngineError", "InProcess", "chosen_engine"]


def chosen_engine(name: str | None = None) -> Engine:
    """The engine called `name`, by default ENGINE's; EngineError for an unknown or missing one."""
    name = name or os.environ.get("ENGINE") or ENGINES[0]
    if name not in ENGINES:
        raise EngineError(f"ENGINE = {name!r} must be one of {', '.join(ENGINES)}")
    if name == "ray":
        from hashattn.engines.on_ray import RayEngine

        return RayEngine()
    return InProcess()

"""Files that are either whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashattn.errors import HashWeightsError


def _publish(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(path.name + ".partial")
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        temporary,
        dict(metadata or {}) | {"format": "pt"},
    )
    _publish(temporary, path)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN is refused, it is not JSON."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(
        json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    _publish(temporary, path)


def read_tensors(path: Path, hint: str) -> dict[str, Tensor]:
    """Read a safetensors file; HashWeightsError if it is missing, truncated or not one."""
    if not path.is_file():
        raise HashWeightsError(f"{path} does not exist: {hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise HashWeightsError(
            f"{path} is truncated or damaged ({error}): copy it again, or {hint}"
        ) from error

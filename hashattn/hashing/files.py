"""Tensors in safetensors files that are either whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashattn.base.errors import HashWeightsError
from hashattn.base.files import WriteError, replacing


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; WriteError where the disk does not take it."""
    with replacing(path) as partial:
        try:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                partial,
                dict(metadata or {}) | {"format": "pt"},
            )
        except SafetensorError as error:  # how it passes on what the system says
            raise WriteError(f"{path} cannot be written ({error})") from error


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

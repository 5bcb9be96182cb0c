"""Tensors in safetensors files, read with a clear error, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashattn.base.files import FileError, WriteError, replacing


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors of any shapes and devices; WriteError as `replacing`."""
    with replacing(path) as partial:
        try:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                partial,
                dict(metadata or {}) | {"format": "pt"},
            )
        except SafetensorError as problem:  # in which safetensors wraps the system's error
            raise WriteError(f"{path} cannot be written ({problem})") from problem


def read_tensors(
    path: str | Path, error: type[Exception] = FileError, remedy: str = "take another copy"
) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; `error` if it is missing, truncated or not safetensors.

    remedy: what the message tells to do where there is no other copy.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} does not exist: {remedy}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise error(
            f"{path} is truncated or damaged ({problem}): copy it again, or {remedy}"
        ) from problem

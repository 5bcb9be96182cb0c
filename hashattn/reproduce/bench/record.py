"""Result files: measured numbers with the machine, versions and protocol they come from."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from hashattn.base.environment import device_name, package_versions, python_version, system_name
from hashattn.base.files import FileError, read_json, write_text

FORMAT = 1
_PACKAGES = ("hashattn", "torch", "triton", "numba", "numpy", "transformers", "faiss-cpu",
            "flashinfer-python")  # fmt: skip


def protocol_of(clock: str, seed: int) -> dict[str, Any]:
    """What was the same for all rows of a measurement."""
    return {"clock": clock, "threads": torch.get_num_threads(), "seed": seed}


def environment() -> dict[str, Any]:
    """Device, system and the versions of those _PACKAGES that are installed."""
    packages = {name: version for name, version in package_versions(_PACKAGES).items() if version}
    return {"device": device_name(), "system": system_name(), "python": python_version(),
            "packages": packages}  # fmt: skip


def save(path: Path, **content: Any) -> None:
    """Write a result file: environment, date and `content`."""
    record = {"format": FORMAT, "date": str(date.today()), "environment": environment()} | content
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def load(path: Path) -> dict[str, Any]:
    """A result file. FileError when it is damaged, or was written by another version."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileError(f"{path}: written by another version of hashattn; measure again")
    return record

"""Where a number comes from: machine, versions, protocol, kept beside it."""

from __future__ import annotations

import json
import platform
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hashattn.base.files import FileError, read_json, write_text

FORMAT = 1
PACKAGES = ("hashattn", "torch", "triton", "numba", "numpy", "transformers", "faiss-cpu",
            "flashinfer-python")  # fmt: skip


def protocol_of(clock: str, seed: int) -> dict[str, Any]:
    """What was the same for all rows of a measurement."""
    return {"clock": clock, "threads": torch.get_num_threads(), "seed": seed}


def environment() -> dict[str, Any]:
    """Device, system and package versions."""
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    return {"device": device_name(), "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(), "packages": packages}  # fmt: skip


@cache
def device_name() -> str:
    """The GPU's name, or the processor's and how many cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(path: Path, **content: Any) -> None:
    """Write a result file: environment, date, and the given parts."""
    record = {"format": FORMAT, "date": str(date.today()), "environment": environment()} | content
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def load(path: Path) -> dict[str, Any]:
    """A result file. FileError when it is damaged, or was written by another version."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileError(f"{path}: written by another version of hashattn; measure again")
    return record


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

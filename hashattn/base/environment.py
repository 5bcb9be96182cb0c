"""What a number was computed on and with: the machine, the GPU, the versions of packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")


def python_version() -> str:
    """Of the interpreter, as "3.11.9"."""
    return platform.python_version()


@cache
def _package_version(name: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """`_package_version` of each name."""
    return {name: _package_version(name) for name in names}


def machine() -> dict[str, Any]:
    """System, processor, cores, threads, memory and GPU: what a time was measured on."""
    import torch

    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_name(),
    }


def device_name() -> str:
    """The GPU's name, or the processor's and the number of threads torch uses."""
    import torch

    return _gpu_name() or f"{processor()}, {torch.get_num_threads()} threads"


def system_name() -> str:
    """The kind of system without its release, as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def _gpu_name() -> str | None:
    """The name of torch's current GPU, None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def processor() -> str:
    """The processor's model name; only its kind where the system does not name the model."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

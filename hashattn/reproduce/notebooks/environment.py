"""Where a notebook ran: interpreter, package versions and machine, recorded by its own kernel."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hashattn.base.files import write_json
from hashattn.base.repository import repository
from hashattn.reproduce.notebooks.files import read_kept


def environment() -> dict[str, Any]:
    """This process: python (version), executable, packages (those of the lock) and machine."""
    return {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "packages": package_versions(repository() / "requirements.lock"),
        "machine": machine(),
    }


def leave_environment(results: Path, notebook: str) -> None:
    """Write this process's environment() to <results>/environments/<notebook>.json."""
    write_json(_path(results, notebook), environment())


def forget_environment(results: Path, notebook: str) -> None:
    """Remove what an earlier run of a notebook left."""
    _path(results, notebook).unlink(missing_ok=True)


def load_environment(results: Path, notebook: str) -> dict[str, Any] | None:
    """What the kernel that ran a notebook left; None where it makes no claims."""
    return read_kept(_path(results, notebook))


def _path(results: Path, notebook: str) -> Path:
    return results / "environments" / f"{notebook}.json"


def package_versions(lock: Path) -> dict[str, str | None]:
    """Installed version of each package in the lock file; None where it is not installed."""
    names = (line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line)
    return {name: _installed(name) for name in names}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and GPU: what a time was measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

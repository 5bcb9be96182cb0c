"""Where a notebook ran: interpreter, package versions and machine, recorded by its kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hashattn.base.environment import machine, package_versions, python_version
from hashattn.base.files import write_json
from hashattn.base.repository import repository
from hashattn.reproduce.notebooks.files import read_or_none


def environment() -> dict[str, Any]:
    """This process's python (version), executable, packages (those of the lock) and machine."""
    return {
        "python": python_version(),
        "executable": sys.executable,
        "packages": lock_versions(repository() / "requirements.lock"),
        "machine": machine(),
    }


def leave_environment(results: Path, notebook: str) -> None:
    """Write this process's environment() to <results>/environments/<notebook>.json."""
    write_json(_path(results, notebook), environment())


def forget_environment(results: Path, notebook: str) -> None:
    """Remove what an earlier run of a notebook left."""
    _path(results, notebook).unlink(missing_ok=True)


def load_environment(results: Path, notebook: str) -> dict[str, Any] | None:
    """What the kernel that ran a notebook left; None if the notebook makes no claims."""
    return read_or_none(_path(results, notebook))


def _path(results: Path, notebook: str) -> Path:
    return results / "environments" / f"{notebook}.json"


def lock_versions(lock: Path) -> dict[str, str | None]:
    """Installed version of each package in the lock file; None where it is not installed."""
    lines = lock.read_text().splitlines()
    return package_versions(line.split("==")[0] for line in lines if "==" in line)

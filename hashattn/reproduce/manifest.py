"""The manifest: everything a reader needs to know which run produced a number."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hashattn.profiles import Profile, repository
from hashattn.reproduce.execute import State
from hashattn.reproduce.files import produced_files, sha256_file
from hashattn.reproduce.fingerprint import input_hashes
from hashattn.source import sources_sha256


def build_manifest(profile: Profile, states: dict[str, State]) -> dict[str, Any]:
    """Versions, machine, git commit, seeds, input hashes, seconds and every file's SHA-256."""
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "profile": profile.to_dict(),
        "seeds": {"profile": profile.seed},
        "git": git_state(repository()),
        "package_sha256": sources_sha256(),
        "inputs_sha256": input_hashes(profile),
        "python": sys.version.split()[0],
        "packages": package_versions(repository() / "requirements.lock"),
        "machine": machine(),
        "seconds": {name: state.seconds for name, state in states.items()},
        "fingerprints": {name: state.fingerprint for name, state in states.items()},
        "files_sha256": {
            path.relative_to(profile.results).as_posix(): sha256_file(path)
            for path in produced_files(profile.results)
        },
    }


def package_versions(lock: Path) -> dict[str, str | None]:
    """Installed version of each package in the lock file; None where it is not installed."""
    names = (line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line)
    return {name: _installed(name) for name in names}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_state(root: Path) -> dict[str, Any]:
    """The commit and whether tracked files differ from it; both None outside a git checkout."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None or commit is None else changes != ""}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU: what a time in this run was measured on."""
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

"""The manifest: everything a reader needs to know which run produced a number."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from hashattn.base.hashes import sha256_file
from hashattn.base.source import sources_sha256
from hashattn.reproduce.notebooks.environment import load_environment
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.notebooks.files import produced_files
from hashattn.reproduce.notebooks.fingerprint import input_hashes
from hashattn.reproduce.profiles import Profile, repository


def build_manifest(profile: Profile, states: dict[str, State]) -> dict[str, Any]:
    """Versions, machine, git commit, seeds, input hashes, seconds and every file's SHA-256.

    environments: of each notebook's kernel (None for a notebook without claims); python,
    executable, packages and machine are those of the last one known.
    """
    environments = {name: load_environment(profile.results, name) for name in states}
    last = next((known for known in reversed(environments.values()) if known), {})
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "profile": profile.to_dict(),
        "seeds": {"profile": profile.seed},
        "git": git_state(repository()),
        "package_sha256": sources_sha256(),
        "inputs_sha256": input_hashes(profile),
        **{name: last.get(name) for name in ("python", "executable", "packages", "machine")},
        "environments": environments,
        "seconds": {name: state.seconds for name, state in states.items()},
        "fingerprints": {name: state.fingerprint for name, state in states.items()},
        "files_sha256": {
            path.relative_to(profile.results).as_posix(): sha256_file(path)
            for path in produced_files(profile.results)
        },
    }


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

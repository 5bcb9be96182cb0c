"""Run one notebook with papermill: into a partial file first, renamed when every cell succeeded.

The kernel is the driver's own interpreter, whatever kernelspecs Jupyter finds elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hashattn.base.errors import HashAttnError
from hashattn.base.files import write_json
from hashattn.base.hashes import sha256_file
from hashattn.base.progress import VARIABLE
from hashattn.reproduce.notebooks.environment import forget_environment
from hashattn.reproduce.notebooks.files import produced_files, read_or_none
from hashattn.reproduce.notebooks.progress import Heartbeat
from hashattn.reproduce.profiles import Profile, repository, results_root

# hides messages about transport and shutdown, which no reader can act on
_QUIET_KERNEL = ["--IPKernelApp.log_level=50"]
_QUIET_LIBRARIES = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
_NEEDED = ("papermill", "nbclient", "ipykernel")  # to run a notebook at all


class KernelError(HashAttnError, RuntimeError):
    """This interpreter cannot run notebooks."""


class NotebookFailed(HashAttnError, RuntimeError):
    """A cell raised, a kernel died or a cell ran too long. The message is two lines."""


@dataclass
class State:
    """What a finished run of a notebook left: results/state/<notebook>.json."""

    fingerprint: str
    seconds: float
    finished: str
    files: dict[str, str] = field(default_factory=dict)  # path in the results folder: SHA-256

    @classmethod
    def load(cls, results: Path, notebook: str) -> State | None:
        record = read_or_none(results / "state" / f"{notebook}.json")
        whole = isinstance(record, dict) and set(record) == {field.name for field in fields(cls)}
        return cls(**record) if whole else None

    def save(self, results: Path, notebook: str) -> None:
        write_json(results / "state" / f"{notebook}.json", asdict(self))

    def still_valid(self, results: Path, fingerprint: str) -> bool:
        """Same inputs, and every file it produced is there."""
        return self.fingerprint == fingerprint and all((results / f).is_file() for f in self.files)


def require_kernel() -> None:
    """KernelError if this interpreter lacks a package that runs notebooks."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise KernelError(
            f"{sys.executable} runs the notebooks and has no {', '.join(missing)}: run make setup, "
            "or pip install -e '.[notebooks]' with it"
        )


def _own_kernel() -> type:
    """A kernel manager class whose kernels are this interpreter, not what a kernelspec names."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    return OwnKernel


def kernel_environment(profile: Profile, profile_file: Path) -> dict[str, str]:
    """The variables that a notebook's kernel needs besides the caller's own."""
    root = repository()
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return _QUIET_LIBRARIES | {
        "HASHATTN_HOME": str(root),
        "HASHATTN_PROFILE": str(profile_file),
        "HASHATTN_RESULTS": str(results_root()),
        VARIABLE: str(profile.results / "progress.txt"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def run_notebook(source: Path, results: Path, fingerprint: str) -> State:
    """Execute `source` into results/notebooks, record what it produced and return that record.

    Raises NotebookFailed with the cause, the cell and the partial notebook's path.
    """
    executed = results / "notebooks" / source.name
    partial = executed.with_suffix(".partial.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    forget_environment(results, source.stem)
    before = _times(results)
    start = time.monotonic()
    with Heartbeat(source.stem, partial, results / "progress.txt"):
        execute(source, partial)
    partial.replace(executed)
    written = [path for path, stamp in _times(results).items() if before.get(path) != stamp]
    state = State(
        fingerprint,
        round(time.monotonic() - start, 1),
        time.strftime("%Y-%m-%d %H:%M"),
        {path.relative_to(results).as_posix(): sha256_file(path) for path in written},
    )
    state.save(results, source.stem)
    return state


def _times(results: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in produced_files(results)}


def execute(source: Path, partial: Path, parameters: Mapping[str, Any] | None = None) -> None:
    """Run a notebook's cells, `parameters` in place of those it sets; `partial` shows how far it
    came. NotebookFailed."""
    import papermill
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        papermill.execute_notebook(
            source,
            partial,
            dict(parameters or {}),
            kernel_name="python3",
            kernel_manager_class=_own_kernel(),
            cwd=source.parent,
            progress_bar=False,
            extra_arguments=_QUIET_KERNEL,
        )
    except PapermillExecutionError as error:
        cause = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise _failure(source, partial, cause) from None
    except (DeadKernelError, CellTimeoutError, CellExecutionError, PapermillException) as error:
        raise _failure(source, partial, f"{type(error).__name__}: {error}") from error


def _failure(source: Path, partial: Path, cause: str) -> NotebookFailed:
    return NotebookFailed(
        f"{source.name} failed in {' '.join(cause.split())[:400]}\n"
        f"see {partial}; earlier notebooks are kept, run again to resume"
    )

"""Reads files in a process of its own, which may fail without harm; why: see `child`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hashattn
from hashattn.pilot.documents.limits import ReadLimits
from hashattn.pilot.documents.skipped import DocumentsError, Refused

_ROOT = Path(hashattn.__file__).parents[1]


class Reader:
    """A context in which files are read; the process starts with the first and ends with it."""

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def read(self, task: str, content: bytes, kind: str) -> Any:
        """The result of one of the child's tasks.

        Refused says why there is none; DocumentsError if a package is not installed.
        """
        limits = self._limits
        job = {
            "task": task,
            "kind": kind,
            "size": len(content),
            "seconds": limits.seconds,
            "limits": asdict(limits),
        }
        answer = self._ask(json.dumps(job).encode() + b"\n" + content)
        if "missing" in answer:
            raise DocumentsError(
                f"{kind} files need the package {answer['missing']}: pip install -e '.[pilot]'"
            )
        if "refused" in answer:
            key, values = answer["refused"]
            if key == "memory":
                self._stop()  # the next file gets all of it again
            raise Refused(key, **values)
        return answer["result"]

    def _ask(self, job: bytes) -> dict[str, Any]:
        process = self._process = self._process or self._start()
        line = b""
        with suppress(OSError):  # it ended while it was written to
            process.stdin.write(job)
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        ended = self._stop()
        if ended == -signal.SIGALRM:
            raise Refused("timeout", seconds=self._limits.seconds)
        raise Refused("crashed")

    def _start(self) -> subprocess.Popen:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: the folder that is worked in may hold a csv.py; one thread: each takes memory
        return subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", "hashattn.pilot.documents.child",
             str(self._limits.memory_bytes)],
            env=os.environ | {
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which ends this process
        )  # fmt: skip

    def _stop(self) -> int | None:
        """End the process; how it ended by itself, if it did."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(OSError):
            process.stdin.close()  # it ends when its input does
        process.stdout.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

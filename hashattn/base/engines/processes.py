"""The engine of one machine's cores: processes of one thread each, that need no other package.

Each is started as a command of its own (base.engines.worker), neither forked, which is unsafe
beside torch's threads, nor spawned by multiprocessing, which would run the caller's script again:
notebooks, and scripts without a main guard, may use it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

import torch

from hashattn.base.engines.base import PAUSE, RETRY, EngineError, Work
from hashattn.base.engines.threads import VARIABLES
from hashattn.base.progress import ReportedProgress

PROCESS_BYTES = 2**30  # of torch, the packages and what a step needs beside its data
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SHOWN_BYTES = 2000  # of what a worker that died wrote
END = object()  # instead of a job: there is none any more


class Processes:
    """Jobs in up to `count` processes of one thread each, started as jobs need them.

    Work and items are pickled, by reference to modules that can be imported (not `__main__`).
    Raises ValueError for count < 1.
    """

    local = True

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count = {count}: must be at least 1")
        self.count = count

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run; results of jobs that run at the same time are interleaved.

        What a worker raises is raised here, with a note of its traceback. EngineError when one ends
        without a word. All are ended when no job is left or the caller looks no further.
        """
        team, progress = _Team(pickle.dumps(work), self.count), ReportedProgress()
        jobs, more = iter(jobs), True
        try:
            while True:
                more = more and team.hand_out(jobs)
                if not more and not team.busy():
                    return
                for worker in team.ready():
                    kind, value = worker.receive()
                    if kind == "result":
                        worker.items = worker.items[1:]
                        yield value
                    elif kind == "done":
                        worker.items = None
                    elif kind == "progress":
                        progress.show(worker.process.pid, value)
                    else:
                        raise value
        finally:
            team.end()
            progress.close()


def processes_that_fit(jobs: int, job_bytes: int) -> int:
    """How many processes the jobs, torch's threads here and free memory are enough for, at least 1.

    job_bytes: what a job holds in memory.
    """
    fitting = min(jobs, torch.get_num_threads())
    free = _free_bytes()
    if free is not None:
        fitting = min(fitting, free // (job_bytes + PROCESS_BYTES))
    return max(1, fitting)


class _Worker:
    """A process, and what it has not yet given results of; None: it is idle."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.items: Sequence[Any] | None = None
        self._written = tempfile.TemporaryFile()
        paths = [path or os.getcwd() for path in sys.path]  # "" is the current folder
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hashattn.base.engines.worker", str(theirs.fileno())],
                env=os.environ
                | dict.fromkeys(VARIABLES, "1")
                | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._written,
                start_new_session=True,  # Ctrl-C is the caller's, who then ends the workers
            )

    def begin(self, job: Sequence[Any]) -> None:
        """Hands out a job, to an idle worker."""
        self.items = job
        self.send(pickle.dumps(job))

    def send(self, message: bytes) -> None:
        """What the process waits for: first the work, then a job; EngineError if it has ended."""
        try:
            self.connection.send_bytes(message)
        except ConnectionError as error:
            raise self._death() from error

    def receive(self) -> tuple[str, Any]:
        """The next message; EngineError if the process has ended instead."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise self._death() from error

    def end(self) -> None:
        """Ends the process, which has nothing of its own to put in order."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._written.close()

    def _death(self) -> EngineError:
        code = self.process.wait()
        job = f"at work on {str(self.items[0])[:80]}" if self.items else "without work"
        if code == -signal.SIGKILL:
            return EngineError(
                f"a worker process {job} was killed, most likely by the system because memory ran "
                "out: run fewer at a time, by a smaller number in OMP_NUM_THREADS or "
                "torch.set_num_threads (1 needs the least), or on less data"
            )
        self._written.seek(max(0, self._written.seek(0, os.SEEK_END) - SHOWN_BYTES))
        written = self._written.read().decode(errors="replace").strip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return EngineError(f"a worker process {job} {how}; it wrote: {written or 'nothing'}")


class _Team:
    """The workers of one run."""

    def __init__(self, work: bytes, count: int) -> None:
        self.work, self.count = work, count
        self.workers: list[_Worker] = []

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.items is not None]

    def hand_out(self, jobs: Iterator[Sequence[Any] | None]) -> bool:
        """A job for everyone who is idle or may still start; whether there may be more jobs."""
        while len(self.busy()) < self.count:
            job = next(jobs, END)
            if job is END:
                return False
            if job is RETRY:
                return True
            self._idle().begin(job)
        return True

    def ready(self) -> list[_Worker]:
        """Workers with a message, after a pause at most."""
        ready = wait([worker.connection for worker in self.workers], PAUSE)
        return [worker for worker in self.workers if worker.connection in ready]

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _idle(self) -> _Worker:
        for worker in self.workers:
            if worker.items is None:
                return worker
        worker = _Worker()
        self.workers.append(worker)
        worker.send(self.work)
        return worker


def _free_bytes() -> int | None:
    """Memory that this process and its children may still take; None where it is not told."""
    found = []
    meminfo, *limits = map(Path, ("/proc/meminfo", *LIMITS))
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    found += [int(text) for path in limits if path.is_file()
              and (text := path.read_text().strip()).isdigit()]  # fmt: skip
    return min(found, default=None)

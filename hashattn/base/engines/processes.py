"""The engine of one machine's cores: processes of one thread each, which need no other package.

Each is started as a command of its own (base.engines.worker): forking is unsafe beside torch's
threads, and multiprocessing's spawn would run the caller's script again, so that notebooks, and
scripts without a main guard, could not use it.
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

from hashattn.base.checks import require
from hashattn.base.engines import chosen_engine
from hashattn.base.engines.base import PAUSE, RETRY, Engine, EngineError, InProcess, Work
from hashattn.base.engines.threads import VARIABLES
from hashattn.base.progress import ReportedProgress

WORKER = "hashattn.base.engines.worker"
PROCESS_BYTES = 2**30  # for torch, the packages and what a step needs besides its data
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SHOWN_BYTES = 2000  # of a dead worker's stderr
END = object()  # in place of a job: there are no more


class Processes:
    """Jobs in up to `count` processes of one thread each, started as jobs need them.

    Work and items are pickled, by reference to modules that can be imported (not `__main__`).
    Raises ValueError for count < 1.
    """

    local = True

    def __init__(self, count: int) -> None:
        require(count >= 1, "count", count, "at least 1")
        self.count = count

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run; results of jobs that run at the same time are interleaved.

        What a worker raises is raised here, with its traceback as a note; EngineError when one ends
        without saying why. All are ended when no job is left or the caller stops iterating.
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


def spread(jobs: int, job_bytes: int, device: torch.device) -> Engine:
    """The environment's choice; where that is this process alone and on a CPU, as many processes
    as fit (`processes_that_fit`), if that is more than one."""
    engine = chosen_engine()
    if not isinstance(engine, InProcess) or device.type != "cpu":
        return engine
    count = processes_that_fit(jobs, job_bytes)
    return Processes(count) if count > 1 else engine


def processes_that_fit(jobs: int, job_bytes: int) -> int:
    """How many processes the jobs, torch's threads and free memory allow, at least 1.

    job_bytes: what a job holds in memory.
    """
    fitting = min(jobs, torch.get_num_threads())
    free = _free_bytes()
    if free is not None:
        fitting = min(fitting, free // (job_bytes + PROCESS_BYTES))
    return max(1, fitting)


class _Worker:
    """A process, and the items of its job that have no result yet; None: it is idle."""

    def __init__(self) -> None:
        self.connection, worker_end = Pipe()
        self.items: Sequence[Any] | None = None
        self._stderr = tempfile.TemporaryFile()
        paths = [path or os.getcwd() for path in sys.path]  # "" is the current folder
        with worker_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER, str(worker_end.fileno())],
                env=os.environ
                | dict.fromkeys(VARIABLES, "1")
                | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C is the caller's, who then ends the workers
            )

    def begin(self, job: Sequence[Any]) -> None:
        """Give the job to this worker, which is idle."""
        self.items = job
        self.send(pickle.dumps(job))

    def send(self, message: bytes) -> None:
        """Send what the process waits for: the work, then jobs; EngineError if it has ended."""
        try:
            self.connection.send_bytes(message)
        except ConnectionError as error:
            raise self._death() from error

    def receive(self) -> tuple[str, Any]:
        """The process's next message; EngineError if it has ended instead."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise self._death() from error

    def end(self) -> None:
        """End the process, which has nothing to clean up."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._stderr.close()

    def _death(self) -> EngineError:
        code = self.process.wait()
        job = f"at work on {str(self.items[0])[:80]}" if self.items else "without work"
        if code == -signal.SIGKILL:
            return EngineError(
                f"a worker process {job} was killed, most likely by the system because memory ran "
                "out: run fewer at a time, by a smaller number in OMP_NUM_THREADS or "
                "torch.set_num_threads (1 needs the least), or on less data"
            )
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _SHOWN_BYTES))
        written = self._stderr.read().decode(errors="replace").strip()
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
        """Give jobs to idle workers and to new ones up to `count`; False if no job is left."""
        while len(self.busy()) < self.count:
            job = next(jobs, END)
            if job is END:
                return False
            if job is RETRY:
                return True
            self._idle_worker().begin(job)
        return True

    def ready(self) -> list[_Worker]:
        """Workers that have sent a message, after waiting PAUSE at most."""
        ready = wait([worker.connection for worker in self.workers], PAUSE)
        return [worker for worker in self.workers if worker.connection in ready]

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _idle_worker(self) -> _Worker:
        for worker in self.workers:
            if worker.items is None:
                return worker
        worker = _Worker()
        self.workers.append(worker)
        worker.send(self.work)
        return worker


def _free_bytes() -> int | None:
    """Memory that this process and its children may still take; None if the system does not say."""
    amounts = []
    meminfo, *limits = map(Path, ("/proc/meminfo", *LIMITS))
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            amounts.append(int(fields["MemAvailable"].split()[0]) * 1024)
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    amounts += [int(text) for text in texts if text.isdigit()]
    return min(amounts, default=None)

"""The engine on a Ray cluster: actors that hold the work, each on CPUs or a GPU of its own.

RAY_ADDRESS names a cluster; without it one is started on this machine and ends with the process.
The driver hands out jobs and takes results one by one, so that a worker that dies loses only the
item it was computing: the rest of its job goes to another.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hashattn.base.engines.base import PAUSE, EngineError, Work
from hashattn.base.source import packages, sources_sha256

_ATTEMPTS = 3  # workers that may die at one item
PATIENCE = 180.0  # seconds without any worker: nodes may have to start first


class RayEngine:
    """Jobs on the nodes of a Ray cluster, each worker with as many threads as this process.

    address: of the cluster; by default RAY_ADDRESS, or "local". Every node needs the packages of
    this environment, hashattn in the same version: installed, or at the same path. Work on a GPU
    gets a GPU for each worker. Raises EngineError without a cluster.
    """

    local = False

    def __init__(self, address: str | None = None) -> None:
        import ray

        self.ray = ray
        if not ray.is_initialized():
            _connect(ray, address or os.environ.get("RAY_ADDRESS") or "local")

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run; the results of jobs that run at the same time are interleaved.

        EngineError when _ATTEMPTS workers died at one item, or no worker starts.
        """
        pool = _Pool(self.ray, work)
        try:
            yield from pool.run(iter(jobs))
        finally:
            pool.close()


def _connect(ray: Any, address: str) -> None:
    paths = [str(package.parent) for package in packages()]
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
            **({"include_dashboard": False} if address == "local" else {}),
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster at {address!r} ({error}): start one with `ray start --head`, set "
            "RAY_ADDRESS to it, or unset it to use this machine alone"
        ) from error


class _Actor:
    """In a worker process: holds the work and streams a job's results."""

    def __init__(self, work: Work, threads: int, sources: str) -> None:
        if sources_sha256() != sources:
            raise EngineError(
                f"hashattn in {packages()[0]} on this node is another version than the driver's: "
                "install the same on every node"
            )
        torch.set_num_threads(threads)  # as the driver's: float sums depend on it
        self.work = work

    def ready(self) -> None:
        """Returns when the worker has started."""

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """The results of a job's items."""
        yield from self.work(items)


class _Worker:
    """An actor, and what is awaited from it: its start or a job's next result; None: it is idle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.starting = True
        self.awaited = actor.ready.remote()
        self.rest: Sequence[Any] = ()  # items of its job that have no result yet

    @property
    def idle(self) -> bool:
        return self.awaited is None

    def begin(self, job: Sequence[Any]) -> None:
        self.rest = list(job)
        self.awaited = self.actor.run.options(num_returns="streaming").remote(self.rest)


class _Pool:
    """The workers of one run, and the jobs that wait for one."""

    def __init__(self, ray: Any, work: Work) -> None:
        self.ray, threads = ray, torch.get_num_threads()
        on_gpu = str(getattr(work, "device", "cpu")).startswith("cuda")
        self.resource = ("GPU", 1) if on_gpu else ("CPU", threads)
        options = {"num_gpus": 1} if on_gpu else {"num_cpus": threads}
        self._actor_class = ray.remote(**options)(_Actor)
        self._arguments = (ray.put(work), threads, sources_sha256())
        self.workers: list[_Worker] = []
        self.waiting: deque[Sequence[Any]] = deque()
        self.more = True  # whether there may be more jobs to take
        self.deaths: Counter[int] = Counter()  # by id of the item at hand, 0 before the start
        self._last_sign_of_life, self._last_count = time.monotonic(), -math.inf

    def run(self, jobs: Iterator[Sequence[Any] | None]) -> Iterator[Any]:
        """The results as they come, until no job is left."""
        while True:
            self._hand_out(jobs)
            if not self.more and not self.waiting and not any(w.rest for w in self.workers):
                return
            for worker in self._ready():
                yield from self._take(worker)

    def close(self) -> None:
        """Ends all workers."""
        for worker in self.workers:
            self.ray.kill(worker.actor)

    def _hand_out(self, jobs: Iterator[Sequence[Any] | None]) -> None:
        """Give every idle worker a job, and start a worker for every job without one, while the
        cluster has room."""
        for worker in self.workers:
            if worker.idle and (job := self._next_job(jobs)) is not None:
                worker.begin(job)
        idle = any(worker.idle for worker in self.workers)
        for _ in range(0 if idle else self._room()):
            if len(self.waiting) <= sum(worker.starting for worker in self.workers):
                job = self._next_job(jobs, fresh=True)
                if job is None:
                    return
                self.waiting.append(job)
            self.workers.append(_Worker(self._actor_class.remote(*self._arguments)))

    def _next_job(
        self, jobs: Iterator[Sequence[Any] | None], fresh: bool = False
    ) -> Sequence[Any] | None:
        if self.waiting and not fresh:
            return self.waiting.popleft()
        if not self.more:
            return None
        done = object()
        job = next(jobs, done)
        self.more = job is not done
        return job if self.more else None

    def _room(self) -> int:
        """How many more workers the cluster's nodes have room for, counted once a second."""
        if not self.more and not self.waiting or time.monotonic() < self._last_count + 1:
            return 0
        self._last_count = time.monotonic()
        name, amount = self.resource
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(int(node.get(name, 0) // amount) for node in nodes) - len(self.workers)

    def _ready(self) -> list[_Worker]:
        """Workers that have something to take, after waiting PAUSE at most."""
        busy = [worker for worker in self.workers if not worker.idle]
        if all(worker.starting for worker in busy):
            self._check_patience()
        if not busy:
            time.sleep(PAUSE)
            return []
        awaited = [worker.awaited for worker in busy]
        self.ray.wait(awaited, num_returns=1, timeout=PAUSE)
        ready, _ = self.ray.wait(awaited, num_returns=len(awaited), timeout=0)
        return [worker for worker in busy if any(worker.awaited is one for one in ready)]

    def _check_patience(self) -> None:
        if self.more and not self.waiting or any(worker.idle for worker in self.workers):
            self._last_sign_of_life = time.monotonic()  # there is nothing to do
        elif time.monotonic() > self._last_sign_of_life + PATIENCE:
            name, amount = self.resource
            raise EngineError(
                f"no worker has started in {PATIENCE:.0f} s: no node of the cluster has {amount} "
                f"{name} free; add a node, or set OMP_NUM_THREADS to fewer threads"
            )

    def _take(self, worker: _Worker) -> Iterator[Any]:
        """The worker's next result, if that was awaited from it."""
        from ray import exceptions

        try:
            if worker.starting:
                self.ray.get(worker.awaited)
                worker.starting, worker.awaited = False, None
                return
            result = self.ray.get(next(worker.awaited))
        except StopIteration:
            worker.awaited, worker.rest = None, ()
            return
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except exceptions.RayError as error:
            self._remove_dead(worker, error)
            return
        finally:
            self._last_sign_of_life = time.monotonic()
        self.deaths.pop(id(worker.rest[0]), None)
        worker.rest = worker.rest[1:]
        yield result

    def _remove_dead(self, worker: _Worker, error: Exception) -> None:
        """Remove a dead worker; the rest of its job waits for another."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        item = id(worker.rest[0]) if worker.rest else 0
        self.deaths[item] += 1
        if self.deaths[item] >= _ATTEMPTS:
            place = "at the same item" if item else "before they had started"
            raise EngineError(f"{_ATTEMPTS} workers died {place}; the last one: {error}") from error
        if worker.rest:
            self.waiting.appendleft(worker.rest)

"""What an engine is, and the one that needs no other process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from hashattn.base.errors import HashAttnError

Work = Callable[[Sequence[Any]], Iterable[Any]]
RETRY = None  # in place of a job: one may come in a moment
PAUSE = 0.3  # seconds before asking again


class EngineError(HashAttnError, RuntimeError):
    """An engine is unknown or not installed, or has lost its workers."""


class Engine(Protocol):
    """Computes jobs, which are sequences of items.

    local: whether all jobs are computed on this machine, so that items may name its files.
    """

    local: bool

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """The results of all jobs as they come: one for each item, a job's in its items' order.

        work(items) yields one result an item, and must give the same if it is called again with
        only the rest of a job. Engines with other processes pickle it and the items. A job is taken
        from `jobs` when there is room for it; after RETRY in place of one, again in a moment.
        Raises what `work` raises, and EngineError.
        """


class InProcess:
    """One job after another, in this process."""

    local = True

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run."""
        for job in present(jobs):
            yield from work(job)
            del job  # free a layer's queries and keys, which are large, before the next job is made


def present(jobs: Iterable[Sequence[Any] | None]) -> Iterator[Sequence[Any]]:
    """The jobs one after another, with a pause wherever RETRY is in place of one."""
    for job in jobs:
        if job is RETRY:
            time.sleep(PAUSE)
        else:
            yield job
        del job

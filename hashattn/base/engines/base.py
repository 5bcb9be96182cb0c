"""What an engine is, and the one that needs no other process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from hashattn.base.errors import HashAttnError

Work = Callable[[Sequence[Any]], Iterable[Any]]
RETRY = None  # instead of a job: there may be one in a moment
PAUSE = 0.3  # seconds before asking again


class EngineError(HashAttnError, RuntimeError):
    """An engine is unknown, not installed, or lost what it computes with."""


class Engine(Protocol):
    """Computes jobs, which are sequences of items.

    local: whether all of them are computed on this machine, so that items may name its files.
    """

    local: bool

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """The results of all jobs as they come: one for each item, a job's in its items' order.

        work(items) yields one result an item, and must give the same for a job's rest alone. It and
        the items have to be picklable for engines with other processes. jobs is asked for the next
        one when there is room for it; RETRY in place of a job asks again in a moment.
        Raises what `work` raises, and EngineError.
        """


class InProcess:
    """One job after the other, in this process."""

    local = True

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run."""
        for job in present(jobs):
            yield from work(job)
            del job  # before the next one is made: a layer's queries and keys are large


def present(jobs: Iterable[Sequence[Any] | None]) -> Iterator[Sequence[Any]]:
    """The jobs one after the other, after a pause wherever there is RETRY in place of one."""
    for job in jobs:
        if job is RETRY:
            time.sleep(PAUSE)
        else:
            yield job
        del job

"""The engine of tensor parallelism: processes that share a model compute every job together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hashattn.base.engines.base import Work, present


class Lockstep:
    """Process 0 takes the jobs and returns the results; the others compute along and return none.

    All processes of the group call `run`, with the same work; only process 0's jobs count.
    A process that fails leaves the others waiting until the group's own time limit, or torchrun,
    ends them.
    """

    local = False  # the group may span machines

    def run(self, work: Work, jobs: Iterable[Sequence[Any] | None]) -> Iterator[Any]:
        """See Engine.run."""
        if not leads():
            while (job := _broadcast(None)) is not None:
                for _ in work(job):
                    pass
            return
        for job in present(jobs):
            yield from work(_broadcast(job))
        _broadcast(None)


def leads() -> bool:
    """Whether this process is process 0 of its group, or has no group."""
    import torch.distributed as dist

    alone = not dist.is_available() or not dist.is_initialized()
    return alone or dist.get_rank() == 0


def _broadcast(job: Sequence[Any] | None) -> Sequence[Any] | None:
    """Process 0's job, in every process."""
    import torch.distributed as dist

    box = [job]
    dist.broadcast_object_list(box, src=0)
    return box[0]

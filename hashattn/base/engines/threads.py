"""torch's number of threads, changed for a while.

Two threads wait for each other at every small operation, and spin while they wait: where another
process has one of the cores, a step of many small operations takes many times as long with both
threads as with one. The kernels use torch's number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which users set the number
STARTED_WITH = torch.get_num_threads()
GAIN = 0.9  # one thread is preferred if it takes less than this share of the time with all
AGAIN = 24  # pieces until the other number is tried again: other processes come and go


@contextmanager
def thread_count(number: int) -> Iterator[None]:
    """torch works with `number` threads inside, and with as many as before afterwards.

    The number is that of the whole process: only one thread of a program should set it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chosen_by_user() -> bool:
    """Whether the environment, or torch.set_num_threads since this module was imported, has set
    this process's number of threads."""
    return any(map(os.environ.get, VARIABLES)) or torch.get_num_threads() != STARTED_WITH


class FasterThreads:
    """Runs pieces of work with all threads and with one in turn, then with what was faster.

    Every piece is run once, so that finding out costs next to nothing; what it computes must not
    depend on the number. Where the user has set the number of threads, nothing is tried.
    """

    def __init__(self) -> None:
        self._pieces: dict[Hashable, int] = {}
        self._seconds: dict[tuple[Hashable, int], float] = {}  # of the last piece, per unit of size

    @contextmanager
    def piece(self, kind: Hashable, size: float = 1.0) -> Iterator[None]:
        """A piece of work that takes as long as others of its kind, times `size`."""
        threads = torch.get_num_threads()
        if threads == 1 or chosen_by_user():
            yield
            return
        number = self._number(kind, threads)
        with thread_count(number):
            start = time.perf_counter()
            yield
            self._seconds[kind, number] = (time.perf_counter() - start) / size
        self._pieces[kind] = self._pieces.get(kind, 0) + 1

    def _number(self, kind: Hashable, threads: int) -> int:
        """All, one, all again (the first piece warms up), then the faster, at times the other."""
        done = self._pieces.get(kind, 0)
        if done < 3:
            return (threads, 1, threads)[done]
        single = self._seconds[kind, 1] < GAIN * self._seconds[kind, threads]
        if done % AGAIN == 0:
            single = not single
        return 1 if single else threads

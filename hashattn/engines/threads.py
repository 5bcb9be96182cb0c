"""torch's number of threads for a while.

Two threads wait for each other at every small operation, and spin while they wait: where another
process has one of the cores, a step of many small operations takes many times as long with both
threads as with one. The kernels follow torch's number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which users say how many
STARTED_WITH = torch.get_num_threads()


@contextmanager
def thread_count(number: int) -> Iterator[None]:
    """torch works with `number` threads inside, and with as many as before afterwards.

    The number is the whole process's: it is for one thread of a program to set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chosen_by_user() -> bool:
    """Whether the environment, or torch.set_num_threads since this module was imported, says how
    many threads this process has."""
    return any(map(os.environ.get, VARIABLES)) or torch.get_num_threads() != STARTED_WITH

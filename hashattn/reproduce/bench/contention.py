"""A step of hash training beside another process on one core.

`python -m hashattn.reproduce.bench.contention`.

Shapes are the embedded model's. With all threads, each small operation waits for the thread whose
core is shared; with one thread, nothing waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hashattn.base.engines.threads import thread_count
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.layer import LayerTrainer
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.recipe import TrainRecipe
from hashattn.reproduce.bench.timing import spread

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64  # the embedded model's
LENGTH, ROWS = 4096, 64
_BUSY = "import os; os.write(1, b'.')\nwhile True: pass"


def contention(
    steps: int = 20, length: int = LENGTH, threads: int | None = None
) -> list[dict[str, Any]]:
    """Milliseconds of a training step: threads, busy (whether another process was), ms, q1, q3.

    With one and with `threads` threads (by default torch's number), alone and beside a process that
    never rests. length: tokens of the training sequence.
    """
    threads = threads or torch.get_num_threads()
    trainer, rows = _trainer(steps, length), []
    for busy in (False, True):
        with _busy_process() if busy else nullcontext():
            for number in sorted({1, threads}):
                with thread_count(number):
                    rows.append({"threads": number, "busy": busy} | spread(_seconds(trainer)))
    return rows


def _trainer(steps: int, length: int) -> LayerTrainer:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(heads, count, HEAD_DIM, generator=generator)
        for heads, count in ((HEADS, ROWS), (KV_HEADS, length))
    )
    captured = CapturedLayer(0, queries, torch.arange(length - ROWS, length), keys, HEAD_DIM**-0.5)
    config = HashConfig((0,), HEADS, KV_HEADS, HEAD_DIM)
    recipe = TrainRecipe.signs().vary(steps=steps, schedule="constant")
    return LayerTrainer([captured], config, recipe, seed=0)


def _seconds(trainer: LayerTrainer) -> list[float]:
    """Seconds of each step of the recipe, after a first that warms up and is not counted."""
    seconds = []
    for number in range(-1, trainer.recipe.steps):
        start = time.perf_counter()
        trainer.step(max(number, 0))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


@contextmanager
def _busy_process() -> Iterator[None]:
    """A process that never rests, pinned to one core where the system allows it."""
    process = subprocess.Popen([sys.executable, "-S", "-c", _BUSY], stdout=subprocess.PIPE)
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        process.stdout.read(1)  # wait until it runs
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> int:
    """Measure and print the table."""
    import pandas as pd

    print(pd.DataFrame(contention()).round(2).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many threads decode an evaluation's answers: the number that a measurement finds faster.

Answers do not depend on it, with one reservation: torch's own attention divides one query's keys
among its threads, so that the logits of dense decoding differ in their last bits, as they do
between machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hashattn.base.engines.threads import GAIN, chosen_by_user, thread_count
from hashattn.base.progress import say
from hashattn.evaluation.answering import PrefilledContext, feed

STEPS, ROUNDS = 4, 3  # decode steps at a time with each number, and how often
LONG = 0.25  # seconds; steps that take longer are worth all threads

# {model: {bit length of the context's length: threads}}
_measured_threads: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def decode_threads(context: PrefilledContext, progress: bool = False) -> int:
    """1 if one thread decodes after this context clearly faster than torch's number, else that.

    Measured with dense steps, once in a process for each model and doubling of the context's
    length. Nothing is measured if the user set the number of threads, on a GPU, or if a step takes
    longer than LONG. progress: say so when it is 1.
    """
    threads = torch.get_num_threads()
    if threads == 1 or context.model.device.type != "cpu" or chosen_by_user():
        return threads
    by_size, length = _measured_threads.setdefault(context.model, {}), len(context.tokens)
    size = length.bit_length()
    if size not in by_size:
        seconds = _measured(_step(context), threads)
        faster = seconds[1] < GAIN * seconds[threads]
        by_size[size] = 1 if faster else threads
        if faster and progress:
            one, many = (1e3 * seconds[number] / (STEPS * ROUNDS) for number in (1, threads))
            say(
                f"decoding with 1 thread of {threads}: {one:.1f} ms a token instead of {many:.1f} "
                f"({length} tokens; OMP_NUM_THREADS overrides)"
            )
    return by_size[size]


def _step(context: PrefilledContext) -> Callable[[], Any]:
    """A decode step after the context, in a cache of its own."""
    return partial(feed, context.model, [context.tokens[-1]], context.fork())


@torch.no_grad()
def _measured(step: Callable[[], Any], threads: int) -> dict[int, float]:
    """Seconds of STEPS * ROUNDS steps with one and with `threads` threads, taking turns."""
    seconds = dict.fromkeys((threads, 1), 0.0)
    if _seconds(step, threads, 1) > LONG:
        return {threads: 0.0, 1: float("inf")}
    for _ in range(ROUNDS):
        for number in seconds:
            seconds[number] += _seconds(step, number, STEPS)
    return seconds


def _seconds(step: Callable[[], Any], threads: int, count: int) -> float:
    with thread_count(threads):
        start = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - start

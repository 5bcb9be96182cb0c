"""Timing that compares fairly: peers interleaved in one process, caches cold, medians with spread.

A large buffer is read before every sample: in a real step the other layers evict this one from the
processor's caches, its Python included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hashattn.base.checks import require_numbers, require_one_of

FLUSH_BYTES = 100 * 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Clock = Callable[[], float]
Stages = dict[str, float]
Variant = Callable[[int, Clock], Stages | None]  # round, clock -> seconds of its stages, if any


def measure(
    variants: Mapping[str, Variant], repeats: int, clock: str = "wall"
) -> list[dict[str, Any]]:
    """Milliseconds of every variant and stage: variant, stage, ms (median), q1, q3.

    Every round calls each variant once, with cold caches; a first round only warms up. A variant
    may return the seconds of its stages; "total" is timed around it unless it returns one.
    Raises ValueError for repeats < 1 or an unknown clock.
    """
    require_numbers({"repeats": repeats}, counts={"repeats": 1})
    require_one_of("clock", clock, CLOCKS)
    now, samples = CLOCKS[clock], {}
    buffer = torch.ones(FLUSH_BYTES // 4)
    for number in range(-1, repeats):
        for name, variant in variants.items():
            buffer.sum()
            start = now()
            stages = variant(number, now)
            seconds = {"total": now() - start} | (stages or {})
            if number >= 0:
                for stage, value in seconds.items():
                    samples.setdefault((name, stage), []).append(value)
    return [{"variant": name, "stage": stage} | spread(values)
            for (name, stage), values in samples.items()]  # fmt: skip


def spread(seconds: list[float]) -> dict[str, float]:
    """Median (ms) and quartiles (q1, q3) in milliseconds."""
    marks = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = (torch.tensor(seconds, dtype=torch.float64) * 1e3).quantile(marks).tolist()
    return {"ms": middle, "q1": low, "q3": high}

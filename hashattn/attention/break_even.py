"""From which cached length a sparse decode step is no slower than the model's own: the break-even.

It rests on the milliseconds of one layer's step at a few lengths (attention.step_times measures
them) and on a line a + b n through each of the two sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import numpy as np

from hashattn.base.checks import INT32_MAX, is_count, is_number, require, require_numbers

_MEASURE = "break_even"  # what attach's dense_below says for a threshold that is to be measured


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one way to attend, by length: medians, quartiles, and the line through the
    medians, fixed_ms + per_token_ms * n. Raises ValueError for what are no such times."""

    ms: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    fixed_ms: float
    per_token_ms: float

    def __post_init__(self) -> None:
        for name in ("ms", "low", "high"):
            times = getattr(self, name)
            valid = len(times) == len(self.ms) and all(is_number(t) and t > 0 for t in times)
            require(valid, name, times, "a time above 0 for each length")
        for name in ("fixed_ms", "per_token_ms"):
            require(is_number(getattr(self, name)), name, getattr(self, name), "a number")

    @classmethod
    def of(cls, lengths: Sequence[int], seconds: Sequence[Sequence[float]]) -> StepTimes:
        """Of samples in seconds, several for each length."""
        ms = [1e3 * median(samples) for samples in seconds]
        ends = [quantiles(samples, n=4) for samples in seconds]
        fixed, slope = line(lengths, ms)
        low, high = ([1e3 * marks[k] for marks in ends] for k in (0, 2))
        return cls(tuple(ms), tuple(low), tuple(high), fixed, slope)


def line(lengths: Sequence[float], ms: Sequence[float]) -> tuple[float, float]:
    """(a, b) of ms = a + b n by least squares of the relative error, so that short lengths count as
    much as long ones. ValueError for fewer than two lengths."""
    n, times = np.asarray(lengths, float), np.asarray(ms, float)
    require(len(set(n)) >= 2, "lengths", list(lengths), "two different ones, for a line")
    b, a = np.polyfit(n, times, 1, w=1 / times)
    return float(a), float(b)


@dataclass(frozen=True)
class BreakEven:
    """What was measured on a machine for a model and a method, and the break-even.

    lengths: cached tokens that were timed, increasing. dense: the model's own attention and cache,
    as before attach; sparse: with attach. longest: positions that the model is made for, None where
    it does not say. protocol: how and on what it was measured. Raises ValueError naming a field.
    """

    lengths: tuple[int, ...]
    dense: StepTimes
    sparse: StepTimes
    longest: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = self.lengths
        valid = len(lengths) >= 2 and all(is_count(n, 1, INT32_MAX) for n in lengths)
        valid = valid and list(lengths) == sorted(set(lengths))
        require(valid, "lengths", lengths, "two or more increasing numbers of tokens")
        for name in ("dense", "sparse"):
            times = getattr(self, name).ms
            require(len(times) == len(lengths), name, times, f"a time for each of {lengths}")
        if self.longest is not None:
            require_numbers({"longest": self.longest}, counts={"longest": 1})

    @property
    def tokens(self) -> float:
        """Cached tokens from which a sparse step is no slower by the fitted lines, up to the
        model's positions: an integer, math.inf where there are none.

        At least the shortest length that was timed: below it nothing is known.
        """
        gained_once = self.dense.fixed_ms - self.sparse.fixed_ms
        gained_each = self.dense.per_token_ms - self.sparse.per_token_ms
        if gained_each <= 0:
            ends = (self.lengths[0], self.longest or self.lengths[-1])
            always = all(gained_once + gained_each * n >= 0 for n in ends)
            return self.lengths[0] if always else math.inf
        meet = round(-gained_once / gained_each, 6)  # what the fit rounded is no token more
        tokens = max(self.lengths[0], math.ceil(meet))
        return math.inf if tokens > (self.longest or INT32_MAX) else tokens

    @property
    def extrapolated(self) -> bool:
        """Whether the break-even lies beyond the lengths that were timed."""
        return self.lengths[-1] < self.tokens < math.inf

    def record(self) -> dict[str, Any]:
        """JSON's values; "tokens" is None where no length is enough."""
        tokens = None if self.tokens == math.inf else self.tokens
        content = asdict(self) | {"tokens": tokens, "extrapolated": self.extrapolated}
        return json.loads(json.dumps(content))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> BreakEven:
        """What `record` gave. Raises ValueError, TypeError or KeyError for anything else."""
        sides = {}
        for name in ("dense", "sparse"):
            times = record[name]
            lists = {part: tuple(times[part]) for part in ("ms", "low", "high")}
            sides[name] = StepTimes(**times | lists)
        return cls(tuple(record["lengths"]), **sides, longest=record["longest"],
                   protocol=dict(record["protocol"]))  # fmt: skip


def check_dense_below(value: Any) -> None:
    """ValueError unless `value` is a number of tokens, infinity, a BreakEven or _MEASURE."""
    valid = isinstance(value, BreakEven) or is_count(value, 0) or value == math.inf
    allowed = f'a number of tokens, "{_MEASURE}" to measure it, or what measure_break_even gave'
    require(valid or (isinstance(value, str) and value == _MEASURE), "dense_below", value, allowed)

"""How sure a result is: paired bootstrap over the same samples, interval of a share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hashattn.base.checks import require, require_numbers

ABOVE, BELOW, SAME = "above", "below", "not distinguishable"


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b) with the ends of its bootstrap interval, in the unit of the scores."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "above" or "below" where the interval leaves out zero, else "not distinguishable"."""
        if self.low > 0:
            return ABOVE
        return BELOW if self.high < 0 else SAME

    def scaled(self, factor: float) -> Difference:
        """The same difference in another unit, for example 100 for points."""
        return Difference(self.difference * factor, self.low * factor, self.high * factor)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    n: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Difference:
    """Percentile interval of mean(a) - mean(b), resampling the pairs `n` times.

    a[i] and b[i] are the scores of two methods on sample i. groups[i] names what sample i shares
    with others (the context of several questions): whole groups are drawn then, since their samples
    are not independent. Raises ValueError for scores or groups of unequal length, or none.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"a and b need the same samples, at least one: {len(a)} and {len(b)}")
    require_numbers({"n": n}, counts={"n": 1})
    require(0 < confidence < 1, "confidence", confidence, "a number between 0 and 1")
    deltas = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    sums, counts = _group_sums(deltas, groups)
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(n, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(deltas.mean()), float(low), float(high))


def _group_sums(
    deltas: np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of deltas and number of samples of each group; without groups each sample is one."""
    if groups is None:
        return deltas, np.ones(len(deltas))
    if len(groups) != len(deltas):
        raise ValueError(f"groups names {len(groups)} samples of {len(deltas)}")
    order = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = np.array([order[name] for name in groups])
    return np.bincount(member, weights=deltas), np.bincount(member).astype(np.float64)


def wilson(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of a share, `count` of `of` independent trials (Wilson 1927).

    Trials that share a sequence are not independent: it is too narrow for them. ValueError for a
    count outside 0..of, or no trials.
    """
    require_numbers({"of": of}, counts={"of": 1})
    require(0 <= count <= of, "count", count, f"from 0 to {of}")
    require(0 < confidence < 1, "confidence", confidence, "a number between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, square = count / of, z * z / of
    middle = share + square / 2
    width = z * (share * (1 - share) / of + square / (4 * of)) ** 0.5
    return max(0.0, (middle - width) / (1 + square)), min(1.0, (middle + width) / (1 + square))

"""When a token list has read enough, by what its last tokens brought."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LEAST_HEAVY = 2  # heavy tokens that a list begins with, so that both halves have one
LOG_LIMIT = 13.8  # statistics count from 1e-6 to 1e6
TERMS = 3  # of the regression: constant, and two statistics of a list


class Rule(NamedTuple):
    """A list reads more while this predicts, for one of its heads, a log error above `limit`.

    coefficients (query heads, levels, TERMS) float32: log error = constant + first * log(first
    statistic) + second * log(second) of a list at a level; start (lists,) int64: levels that lists
    begin with; the level after the last is dense. What the statistics are: `verified_step`.
    """

    coefficients: Tensor
    start: Tensor
    limit: float

"""How much haystack fills a prompt: interpolation on the token count, which is nearly linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count

from hashattn.evaluation.benchmarks.ruler.specs import RulerError

CLOSE = 500  # a prompt within 1 / CLOSE of its limit is full
_INTERPOLATIONS = 8  # then halving, which always ends


def largest_fit(
    tokens: Callable[[int], int], limit: int, smallest: int, step: int
) -> tuple[int, int]:
    """(size, tokens(size)) of a prompt of at most `limit` tokens: full, or the next is too long.

    tokens: prompt tokens at a size, about linear in it and unbounded. step: the first step from
    smallest, which gives the slope (tokens per unit). Each call tokenises a prompt; about four are
    needed at any length. RulerError if even the smallest size is too long.
    """
    low, used = smallest, tokens(smallest)
    if used > limit:
        raise RulerError(
            f"the shortest prompt has {used} tokens and only {limit} are left beside the answer: "
            "raise length"
        )
    high, guess, slope = math.inf, smallest + step, 1.0
    for attempt in count(1):
        total = tokens(guess)
        if total > used:  # a unit may add nothing, as a word that merges into the one before
            slope = (total - used) / (guess - low)
        if total <= limit:
            low, used = guess, total
        else:
            high = guess
        if limit - used <= limit / CLOSE or high - low == 1:
            return low, used
        guess = low + max(1, int((limit - used) / slope))
        if attempt > _INTERPOLATIONS:
            guess = (low + high) // 2 if high < math.inf else 2 * guess
        guess = min(guess, high - 1)

"""Selection by float scores: the k-th best found by counting, a digit of its bits at a time.

A float's bits, negative ones inverted, are a whole number in the order of the floats. Each of three
passes counts the numbers that agree with the digits found so far by their next digit; no sort.
"""

import numpy as np

from .selection import M_LISTS, M_ROWS, M_TOKENS, count_ones, masks_of, rows_of
from .simd import at_address, kernel

DIGITS = 2048  # values of a digit, 11 bits; the last pass sees a bit again
SIGN, NOTHING = np.uint32(1 << 31), np.uint32(0xFF800000)  # -0.0, -inf
LEAST, MOST = np.uint32(0), np.uint32(0xFFFFFFFF)  # beyond the order of every number


@kernel
def order_scores(scores, allowed, fixed, orders):
    """orders: of free candidates (no mandatory ones, not -inf) a number above 0 in the order of
    their scores (float32 as uint32), of all other tokens 0. Returns how many are free."""
    free = 0
    for i in range(len(scores)):
        bits = np.uint32(0) if scores[i] == SIGN else scores[i]
        order = ~bits if bits & SIGN else bits | SIGN
        known = allowed[i] and not fixed[i] and bits != NOTHING
        orders[i] = order if known else LEAST
        free += known
    return free


@kernel
def best(orders, k, counts):
    """The k-th largest order (k >= 1, at most the number of free candidates), and how many tokens
    of exactly this order are among the k best. counts: room for DIGITS numbers."""
    found, known = np.uint32(0), np.uint32(0)
    for shift in (np.uint32(21), np.uint32(10), np.uint32(0)):
        counts[:] = 0
        for i in range(len(orders)):
            if orders[i] & known == found:
                counts[(orders[i] >> shift) & np.uint32(DIGITS - 1)] += 1
        digit = DIGITS - 1
        while counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        found |= np.uint32(digit) << shift
        known |= np.uint32(DIGITS - 1) << shift
    return found, k


@kernel
def survey_scores(numbers, scores_at, candidates_at, mandatory_at, orders, survey):
    """survey[unit] = numbers of mandatory tokens and of free candidates; arguments as of
    `selection.survey_units`."""
    lists, rows, n, units = numbers[M_LISTS], numbers[M_ROWS], numbers[M_TOKENS], len(survey)
    scores = at_address(scores_at, units * n, np.uint32)
    candidates, mandatory = masks_of(numbers, candidates_at, mandatory_at)
    for unit in range(units):
        item, line, row = unit // (rows * lists), unit // rows % lists, unit % rows
        allowed, fixed = rows_of(numbers, candidates, mandatory, item, line, row)
        survey[unit, 0] = count_ones(fixed)
        survey[unit, 1] = order_scores(scores[unit * n : (unit + 1) * n], allowed, fixed, orders)


@kernel
def choose_best(numbers, scores_at, candidates_at, mandatory_at, k, orders, counts, out):
    """All `mandatory` tokens and the k best free candidates of every unit to out[unit], ascending,
    -1 after them. orders, counts: room for n and DIGITS numbers."""
    lists, rows, n, units = numbers[M_LISTS], numbers[M_ROWS], numbers[M_TOKENS], len(out)
    scores = at_address(scores_at, units * n, np.uint32)
    candidates, mandatory = masks_of(numbers, candidates_at, mandatory_at)
    for unit in range(units):
        item, line, row = unit // (rows * lists), unit // rows % lists, unit % rows
        allowed, fixed = rows_of(numbers, candidates, mandatory, item, line, row)
        free = order_scores(scores[unit * n : (unit + 1) * n], allowed, fixed, orders)
        threshold, room = (LEAST if k[unit] else MOST), np.int64(0)
        if 0 < k[unit] < free:
            threshold, room = best(orders, k[unit], counts)
        end = 0
        for i in range(n):
            equal = room > 0 and orders[i] == threshold
            if fixed[i] or orders[i] > threshold or equal:
                out[unit, end] = i
                end += 1
                room -= equal
        for i in range(end, out.shape[1]):
            out[unit, i] = -1

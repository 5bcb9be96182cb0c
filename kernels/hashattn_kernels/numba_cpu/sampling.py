"""Sampling by codes: the certain tokens as selection finds them, the others by their coins.

Distances are scored as for selection. The threshold of the coins comes from the distances of some
candidates; then one pass compares every token's coin with what its distance costs.
"""

import math
from functools import cache

import numpy as np

from ..coins import BLOCK, CHANCES, LARGEST, LOG_WEIGHTS, MASK, SIZE, SURVEYED, TABLE
from .bits import below, equal, popcount, reached
from .lookup import TABLES
from .regions import Region, address_of, call_type, report, share_of
from .selection import (
    BYTES,
    WORD,
    count_at_most,
    lowest_bits,
    query_bytes,
    score_list,
    weigh_query,
    write_bits,
)
from .simd import at_address, kernel

CALL = call_type(
    "batch", "lists", "rows", "group", "grades", "most", "lists_per_code_head", "words", "width",
    "sink", "local", "tokens", "keys", "key_size", "key_batch", "key_head", "key_byte",
    "queries", "spans", "out", "memory", "memory_size",
    "units_at", "certain", "drawn", "trust", "state", "first_list", "fresh", "weights",
    "coins", "chances", "log_weights",
)  # fmt: skip
_LOW = np.uint64(MASK)
_FAR = 1 << 62
COINS = np.concatenate((TABLE, TABLE[:BLOCK])).astype(np.int16)  # a block never wraps


@kernel
def survey(levels, size, stride, counts):
    """counts[level]: every stride-th of levels[:size]."""
    counts[:] = 0
    for i in range(0, size, stride):
        counts[levels[i]] += 1


@kernel
def find_certain(levels, size, k, stride, counts):
    """The k-th smallest of levels[:size], how many are less and how many at most as large.

    As selection.kth_smallest, but the search begins where the survey expects it.
    """
    guess, seen = 0, counts[0] * stride
    while seen < k and guess < len(counts) - 1:
        guess += 1
        seen += counts[guess] * stride
    low, high, step = np.int64(-1), np.int64(len(counts)), 1
    smaller, upto = np.int64(0), np.int64(size)  # counts at low, and at high
    while high - low > 1:
        count = count_at_most(levels, size, guess)
        if count >= k:
            high, upto = guess, count
            guess = max(guess - step, (low + high) // 2 if low >= 0 else 0)
        else:
            low, smaller = guess, count
            guess = min(guess + step, (low + high) // 2 if high < len(counts) else len(counts) - 1)
        step *= 2
    return high, smaller, upto


@kernel
def expected(counts, start, stop, stride, tied, unit, tau, cap, chances):
    """How many tokens are expected, times SIZE, with the threshold at tau: `tied` at the level
    before `start`, and stride times the counts of levels from there to `stop`."""
    total = tied * chances[min(max((start - 1) * unit - tau, 0), cap)] if tied else 0
    others = 0
    for level in range(start, stop):
        others += counts[level] * chances[min(max(level * unit - tau, 0), cap)]
    return total + stride * others


@kernel
def find_threshold(counts, above, stride, tied, unit, drawn, cap, chances):
    """reference._threshold from counts of levels; `tied` others are at the level `above`.

    What is expected grows about exponentially with tau, so its logarithm is interpolated; a
    bisection now and then keeps the search short in any case.
    """
    start, stop = above + 1, len(counts)
    while stop > start and counts[stop - 1] == 0:
        stop -= 1
    if stop == start and not tied:
        return np.int64(0)
    while not tied and counts[start] == 0:
        start += 1
    target = drawn * SIZE
    low = (start - 1 if tied else start) * unit - LARGEST - 1
    high = (stop - 1) * unit
    most = expected(counts, start, stop, stride, tied, unit, high, cap, chances)
    if most <= target:
        return high
    least = expected(counts, start, stop, stride, tied, unit, low, cap, chances)
    tries = 0
    while high - low > 1 and least <= target:
        middle = low + (high - low) // 2
        if tries % 3 < 2 and least > 0:
            part = math.log(target / least) / math.log(most / least)
            middle = min(max(low + np.int64((high - low) * part), low + 1), high - 1)
        number = expected(counts, start, stop, stride, tied, unit, middle, cap, chances)
        if number <= target:
            low, least = middle, number
        else:
            high, most = middle, number
        tries += 1
    return low


@kernel
def find_thresholds(costs, counts, drawn, caps, chances, kept, numbers, out):
    """reference._threshold of rows: costs, counts (rows, n) int64, drawn, caps and out (rows,).
    kept, numbers (n,): room for the tokens that count."""
    n = costs.shape[1]
    for row in range(len(out)):
        size, low, high = 0, np.int64(_FAR), np.int64(-_FAR)
        for token in range(n):
            shown = costs[row, token] if counts[row, token] else 0
            low, high = min(low, shown), max(high, shown)
            if counts[row, token]:
                kept[size], numbers[size] = shown, counts[row, token]
                size += 1
        low -= LARGEST + 1
        while low < high:
            middle = low + (high - low + 1) // 2
            total = 0
            for i in range(size):
                total += numbers[i] * chances[min(max(kept[i] - middle, 0), caps[row])]
            if total <= drawn[row] * SIZE:
                low = middle
            else:
                high = middle - 1
        out[row] = low


@kernel
def take(levels, highest, size, above, room, drawn, coins, begins, place, unit, tau, cap, of_level,
         first, out, weights, to, end):  # fmt: skip
    """Write the tokens below the level `above`, `room` of those at it and, if any are drawn, those
    whose coins reach their costs, to out[to:end], and their log weights; returns where they end.

    highest: the largest number of the levels' type. place: of the first token, whose block's coins
    begin at begins[place // BLOCK].
    """
    whole = max(tau, 0) // unit
    rest = tau - whole * unit  # cost = the levels above `whole` times unit, less rest
    less, more = max(rest, 0), max(-rest, 0)
    farthest = min(max((cap + rest) // unit + 1, 0), highest)
    i = 0
    while i < size:
        inside = (place + i) % BLOCK
        stop = min(size, i + BLOCK - inside)
        face = begins[(place + i) // BLOCK] + inside - i
        while i < stop:
            count = min(64, stop - i)
            if count == 64:
                taken = below(levels, i, above) if above >= 0 else np.uint64(0)
                tied = equal(levels, i, above) if room > 0 else np.uint64(0)
                if drawn:
                    taken |= reached(levels, i, coins, face + i, whole, farthest, unit, less, more,
                                     cap)  # fmt: skip
            else:
                tied, taken = np.uint64(0), np.uint64(0)
                for j in range(count):
                    one, level = np.uint64(1) << np.uint64(j), np.int64(levels[i + j])
                    cost = min(max(level * unit - tau, 0), cap)
                    read = level < above or (drawn and coins[face + i + j] >= cost)
                    tied |= one if level == above else np.uint64(0)
                    taken |= one if read else np.uint64(0)
            if room > 0:
                ties = np.int64(popcount(tied))
                if ties > room:
                    tied, ties = lowest_bits(tied, room), room
                taken |= tied
                room -= ties
            else:
                tied = np.uint64(0)
            begin = to
            to = write_bits(taken, first + i, out, to, end)
            for j in range(begin, to):
                weights[j] = of_level[levels[out[j] - first]]
            if tied:  # few blocks have ties that are certain
                for j in range(begin, to):
                    if tied >> np.uint64(out[j] - first - i) & np.uint64(1):
                        weights[j] = np.float32(0)
            i += count
    return to


@kernel
def weigh_levels(above, unit, tau, cap, log_weights, of_level):
    """of_level[level]: the log weight of a token let in by its coin; 0 below the level `above`."""
    for level in range(len(of_level)):
        cost = min(max(level * unit - tau, 0), cap)
        of_level[level] = np.float32(0) if level < above else log_weights[cost]


@kernel
def cap_of(rest, drawn, trust, chances):
    """reference.caps of one row, by bisection on the falling chances."""
    least = trust * drawn
    low, high = np.int64(0), np.int64(LARGEST)
    while low < high:
        middle = (low + high + 1) // 2
        if chances[middle] * rest >= least:
            low = middle
        else:
            high = middle - 1
    return low


@kernel
def mixed(state, number):
    """coins._mixed."""
    x = np.uint64(state) ^ (np.uint64(number) * np.uint64(0x9E3779B9) & _LOW)
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x21F0AAAD) & _LOW
    x = (x ^ (x >> np.uint64(15))) * np.uint64(0x735A2D97) & _LOW
    return x ^ (x >> np.uint64(15))


@kernel
def turn_up(call, line, step, begins):
    """Where the coins of each block of a list begin: Coins.starts."""
    state = mixed(call.state, call.first_list + line)
    state = mixed(state, step if call.fresh else 0)
    for block in range(len(begins)):
        begins[block] = mixed(state, block) & np.uint64(SIZE - 1)


@kernel
def write_certain(first, last, out, weights, to, end):
    """Write first to last to out[to:end] as far as there is room, each with log weight 0; returns
    where they end."""
    for token in range(first, last):
        if to < end:
            out[to], weights[to] = token, np.float32(0)
            to += 1
    return to


@kernel
def prepare_draws(call, line, seen, levels, size, begins, counts):
    """What the draws from levels[:size] for one row, which sees so many tokens, have in common:
    their coins, and the survey, whose stride is returned."""
    turn_up(call, line, seen, begins)
    stride = (size + SURVEYED - 1) // SURVEYED
    survey(levels, size, stride, counts)
    return stride


@kernel
def write_sample(call, first, last, sure, drawn, unit, levels, stride, highest, begins, counts,
                 of_level, coins, chances, log_weights, out, out_weights, at):  # fmt: skip
    """Write a list to out[at : at + width], and its log weights: of the candidates, tokens first to
    last without sink and local ones, the `sure` best by their levels, and of the others those whose
    coins decide so. Where nothing is to be decided, all or none being sure, stride is 0 and nobody
    asks the levels. Returns where the list ends."""
    low = min(first + call.sink, last)
    high = max(last - call.local, low)
    size, end = high - low, at + call.width
    to = write_certain(first, low, out, out_weights, at, end)
    if stride == 0:
        to = write_certain(low, low + sure, out, out_weights, to, end)
    else:
        above, room, tied = np.int64(-1), np.int64(0), np.int64(0)
        if sure > 0:
            above, smaller, upto = find_certain(levels, size, sure, stride, counts)
            room, tied = sure - smaller, upto - sure
        cap = cap_of(size - sure, drawn, call.trust, chances)
        tau = find_threshold(counts, above, stride, tied, unit, drawn, cap, chances)
        weigh_levels(above, unit, tau, cap, log_weights, of_level)
        to = take(levels, highest, size, above, room, drawn > 0, coins, begins, low - first, unit,
                  tau, cap, of_level, low, out, out_weights, to, end)  # fmt: skip
    return write_certain(high, last, out, out_weights, to, end)


@kernel
def sample_list(call, signs, weights, line, first, last, certain, drawn, unit, keys, base, tables,
                levels, highest, begins, counts, of_level, coins, chances, log_weights, out,
                out_weights, at):  # fmt: skip
    """`write_sample` by the distances of a query's codes, padded; returns the list's length. unit:
    what a unit of distance costs; highest: the largest number of the levels' type."""
    low = min(first + call.sink, last)
    size = max(last - call.local, low) - low
    sure, stride = min(certain, size), np.int64(0)
    if sure < size and sure + drawn > 0:
        score_list(call, signs, weights, keys, base + low, size, tables, levels)
        stride = prepare_draws(call, line, last - first, levels, size, begins, counts)
    to = write_sample(
        call, first, last, sure, drawn, unit, levels, stride, highest, begins, counts, of_level,
        coins, chances, log_weights, out, out_weights, at,
    )  # fmt: skip
    for i in range(to, at + call.width):
        out[i], out_weights[i] = -1, np.float32(0)
    return to - at


@kernel
def sample_share(data, kind, highest):
    """Sample for this thread's units: (batch, list, row), the last fastest.

    data: the address of a CALL: selection.CALL, and units, certain and drawn (batch, lists, rows)
    int64; trust as in reference.caps; state, first_list and fresh of the Coins; weights float32,
    like out; the tables COINS, CHANCES and LOG_WEIGHTS.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    batch, lists, rows, words, width = call.batch, call.lists, call.rows, call.words, call.width
    count = batch * lists * rows
    queries = at_address(call.queries, count * call.group * words * (1 + call.grades), np.uint32)
    keys = at_address(call.keys, call.key_size, np.uint8)
    spans = at_address(call.spans, 2 * batch * rows, np.int64)
    units = at_address(call.units_at, count, np.int64)
    certain = at_address(call.certain, count, np.int64)
    drawn = at_address(call.drawn, count, np.int64)
    coins = at_address(call.coins, SIZE + BLOCK, np.int16)
    chances = at_address(call.chances, LARGEST + 1, np.int64)
    log_weights = at_address(call.log_weights, LARGEST + 1, np.float32)
    out = at_address(call.out, count * width, np.int32)
    out_weights = at_address(call.weights, count * width, np.float32)
    memory = call.memory + thread * call.memory_size
    signs = at_address(memory, words, np.uint32)
    weights = at_address(memory + 4 * words, WORD * words, np.uint16)
    memory += query_bytes(words)
    tables = at_address(memory, BYTES * words * TABLES, np.uint8)
    memory += BYTES * words * TABLES
    begins, counts, of_level, levels = drawing_room(memory, call.tokens, call.most, kind)
    for unit in range(start, stop):
        row, line, item = unit % rows, unit // rows % lists, unit // (rows * lists)
        first, last = spans[2 * (item * rows + row)], spans[2 * (item * rows + row) + 1]
        base = item * call.key_batch + line // call.lists_per_code_head * call.key_head
        weigh_query(call, unit, queries, signs, weights)
        sample_list(
            call, signs, weights, line, first, last, certain[unit], drawn[unit], units[unit], keys,
            base, tables, levels, highest, begins, counts, of_level, coins, chances, log_weights,
            out, out_weights, unit * width,
        )  # fmt: skip
    report(call.results, call.threads, thread, 0)


@kernel
def drawing_room(memory, tokens, most, kind):
    """A thread's arrays for `write_sample`: begins, counts, of_level and levels."""
    blocks = (tokens + BLOCK - 1) // BLOCK
    begins = at_address(memory, blocks, np.int64)
    memory += 8 * blocks
    counts = at_address(memory, most + 1, np.int64)
    of_level = at_address(memory + 8 * (most + 1), most + 1, np.float32)
    levels = at_address(memory + 12 * (most + 1), tokens, kind)
    return begins, counts, of_level, levels


def drawing_bytes(tokens: int, most: int, itemsize: int) -> int:
    """Bytes of `drawing_room`."""
    return 8 * -(-tokens // BLOCK) + 12 * (most + 1) + tokens * itemsize


TABLES_AT = tuple(table.ctypes.data for table in (COINS, CHANCES, LOG_WEIGHTS))


@cache
def sample_region(wide: bool) -> Region:
    """The compiled region for distances up to 255, or up to 65,535 if wide."""
    kind = np.uint16 if wide else np.uint8
    highest = int(np.iinfo(kind).max)

    def body(data):
        sample_share(data, kind, highest)

    return Region(body)

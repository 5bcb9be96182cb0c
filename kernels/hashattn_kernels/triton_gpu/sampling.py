"""Sampling by codes, once selection has stored levels and planned the certain tokens.

Three launches more: `survey_kernel` sets each row's threshold of coins, `tally_kernel` counts what
every chunk reads and turns the counts into places, `list_kernel` writes tokens and log weights. The
lists are those of every other backend, bit for bit.
"""

import triton
import triton.language as tl

from ..coins import BLOCK, LARGEST, SIZE, SURVEYED
from .bits import lowest, part, popcount, push_sign, range_mask
from .scoring import COLUMNS, LANES, row_range
from .selection import TILE

COIN_BLOCK = tl.constexpr(BLOCK)
COINS = tl.constexpr(SIZE)
MOST_COST = tl.constexpr(LARGEST)
CANDIDATES = tl.constexpr(SURVEYED)
COUNTERS = ["state", "first_list", "fresh"]  # one build for all values


@triton.jit
def mixed(state, number):
    """coins._mixed of unsigned words."""
    x = state.to(tl.uint32) ^ (number.to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def span_of(SPANS, row, sink, local, lists, q_len):
    """A row's list, and the tokens that it sees and chooses from."""
    span = row // (lists * q_len) * q_len + row % q_len
    first, last, low, high = row_range(SPANS, span, sink, local)
    return row // q_len % lists, first, last, low, high


@triton.jit
def stored(levels, tile, lane, column, PACK: tl.constexpr):
    """Levels at these places of tiles, one by one."""
    packed = tl.load(levels + tile * (TILE // PACK) + lane // PACK * COLUMNS + column)
    return (packed >> (lane % PACK * (32 // PACK))) & (2 ** (32 // PACK) - 1)


@triton.jit
def survey_kernel(
    SPANS, LEVELS, PLAN, DRAWN, UNITS, CHANCES, DRAW,
    sink, local, chunks, lists, q_len, trust,
    PACK: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """DRAW (rows, 2) int32: tau and cap of reference.sample, of some candidates' levels.

    Grid (batch * lists * q_len). LEVELS and PLAN (rows, 4): of selection, with `certain` heavy
    tokens. CHANCES (LARGEST + 1) int32. BINS: a power of 2 above the highest level.
    """
    row = tl.program_id(0)
    _, _, _, low, high = span_of(SPANS, row, sink, local, lists, q_len)
    stored_levels = LEVELS + row.to(tl.int64) * chunks * (TILES * TILE // PACK)
    certain = tl.load(PLAN + 4 * row + 2)
    above = tl.where(certain > 0, tl.load(PLAN + 4 * row), -1)
    tied = tl.where(certain > 0, tl.load(PLAN + 4 * row + 3), 0).to(tl.int64)
    unit = tl.load(UNITS + row).to(tl.int32)
    drawn = tl.load(DRAWN + row)
    size = high - low
    stride = tl.maximum((size + CANDIDATES - 1) // CANDIDATES, 1)
    counts = tl.zeros([BINS], tl.int32)
    place = tl.arange(0, AT_ONCE)
    for start in range(0, (size + stride - 1) // stride, AT_ONCE):
        token = low + (start + place) * stride
        inside = token < high
        token = tl.where(inside, token, low)
        at = stored(stored_levels, token // TILE, token % LANES, token % TILE // LANES, PACK)
        counted = inside & (at > above)
        counts += tl.histogram(tl.where(counted, at, 0), BINS, mask=counted)
    levels = tl.arange(0, BINS)
    shown = (counts > 0) | ((levels == above) & (tied > 0))
    least, most = tl.cast(trust, tl.int64) * drawn, (size - certain).to(tl.int64)
    cap, beyond = size * 0, size * 0 + MOST_COST
    while cap < beyond:
        middle = (cap + beyond + 1) // 2
        fits = tl.load(CHANCES + middle) * most >= least
        cap = tl.where(fits, middle, cap)
        beyond = tl.where(fits, beyond, middle - 1)
    costs = levels * unit
    tau = tl.min(tl.where(shown, costs, 2147483647), axis=0)
    end = tl.max(tl.where(shown, costs, -1), axis=0)
    tau = tl.where(end < 0, 0, tau - MOST_COST - 1)
    end = tl.where(end < 0, 0, end)
    weights = tl.where(levels == above, tied, counts.to(tl.int64) * stride)
    while tau < end:
        middle = tau + (end - tau + 1) // 2
        over = tl.minimum(tl.maximum(costs - middle, 0), cap)
        chance = tl.load(CHANCES + over).to(tl.int64)
        fits = tl.sum(chance * weights, axis=0) <= drawn * COINS
        tau = tl.where(fits, middle, tau)
        end = tl.where(fits, end, middle - 1)
    tl.store(DRAW + 2 * row, tau)
    tl.store(DRAW + 2 * row + 1, cap)


@triton.jit
def words_read(
    levels, word, first, low, high, threshold, room, drawn, TABLE, row_state, unit, tau, cap,
    PACK: tl.constexpr,
):  # fmt: skip
    """Of a tile's words of 32 tokens: those that are read for certain, all that are read by the
    selection, and how many ties were taken. room: how many more ties may be."""
    under = tl.zeros([COLUMNS], tl.int32)
    upto = tl.zeros([COLUMNS], tl.int32)
    hit = tl.zeros([COLUMNS], tl.int32)
    begin = tl.maximum(32 * tl.min(word, axis=0) - first, 0) // COIN_BLOCK
    here = mixed(row_state, begin).to(tl.int32)
    after = mixed(row_state, begin + 1).to(tl.int32)
    for eight in range(LANES - 8, -1, -8):
        for lane in tl.static_range(7, -1, -1):
            if lane % PACK == PACK - 1:
                packed = tl.load(levels + (eight + lane) // PACK * COLUMNS)
            under = push_sign(under, part(packed, lane % PACK, PACK, -threshold))
            upto = push_sign(upto, part(packed, lane % PACK, PACK, -threshold - 1))
            place = tl.maximum(32 * word + eight + lane - first, 0)
            start = tl.where(place // COIN_BLOCK == begin, here, after)
            coin = tl.load(TABLE + ((start + place % COIN_BLOCK) & (COINS - 1)))
            cost = part(packed, lane % PACK, PACK, 0) * unit - tau
            hit = push_sign(hit, tl.minimum(tl.maximum(cost, 0), cap) - coin - 1)
    free = range_mask(word, low, high)
    under &= free
    on = upto & free & ~under
    ties = popcount(on)
    before = tl.cumsum(ties, axis=0) - ties
    left = tl.minimum(tl.maximum(room - before, 0), ties)
    rest = on
    cut = tl.where(left < ties, left, 0)  # one word of a row at most
    for _ in range(tl.max(cut, axis=0)):
        rest = tl.where(cut > 0, rest & (rest - 1), rest)
        cut -= 1
    kept = tl.where(left == ties, on, tl.where(left > 0, on & ~rest, 0))
    sure = under | kept
    return sure, sure | (hit & free & tl.where(drawn > 0, -1, 0)), tl.sum(left, axis=0)


@triton.jit
def rules_of(PLAN, DRAWN, UNITS, DRAW, row):
    """A row's threshold and how many at it are certain, how many are drawn, unit, tau and cap."""
    some = tl.load(PLAN + 4 * row + 2) > 0
    threshold = tl.where(some, tl.load(PLAN + 4 * row), -1)
    taken = tl.where(some, tl.load(PLAN + 4 * row + 1), 0)
    unit = tl.load(UNITS + row).to(tl.int32)
    tau, cap = tl.load(DRAW + 2 * row), tl.load(DRAW + 2 * row + 1)
    return threshold, taken, tl.load(DRAWN + row), unit, tau, cap


@triton.jit(do_not_specialize=COUNTERS)
def tally_kernel(
    SPANS, LEVELS, PLAN, PREFIX, DRAWN, UNITS, DRAW, TABLE, COUNTS, DONE, INDICES, LOG_WEIGHTS,
    sink, local, chunks, lists, q_len, width, state, first_list, fresh,
    PACK: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """COUNTS (rows, chunks) int32: tokens read in each chunk; the last program of a row turns them
    into how many come before, and fills what is left of its list. Grid (chunks, rows)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    member, first, last, low, high = span_of(SPANS, row, sink, local, lists, q_len)
    row_state = mixed(tl.cast(state, tl.uint32), first_list + member)
    row_state = mixed(row_state, tl.where(fresh != 0, last - first, 0))
    threshold, taken, drawn, unit, tau, cap = rules_of(PLAN, DRAWN, UNITS, DRAW, row)
    number = tl.zeros([], tl.int32)
    if (chunk * (TILES * TILE) < last) & ((chunk + 1) * (TILES * TILE) > first):
        column = tl.arange(0, COLUMNS)
        room = taken - tl.load(PREFIX + (row.to(tl.int64) * chunks + chunk) * 2 + 1)
        levels = LEVELS + (row.to(tl.int64) * chunks + chunk) * (TILES * TILE // PACK)
        for step in range(TILES):
            word = (chunk * TILES + step) * COLUMNS + column
            sure, read, ties = words_read(
                levels + column, word, first, low, high, threshold, room, drawn, TABLE, row_state,
                unit, tau, cap, PACK,
            )  # fmt: skip
            always = range_mask(word, first, low) | range_mask(word, high, last)
            number += tl.sum(popcount(read | always), axis=0)
            room -= ties
            levels += TILE // PACK
    counts = COUNTS + row.to(tl.int64) * chunks
    tl.store(counts + chunk, number)
    tl.debug_barrier()
    done = tl.atomic_add(DONE + row, 1, sem="acq_rel", scope="gpu")
    if done == chunks - 1:
        tl.store(DONE + row, 0)
        block = tl.arange(0, BLOCK)
        total = tl.zeros([], tl.int32)
        for start in range(0, chunks, BLOCK):
            inside = start + block < chunks
            own = tl.load(counts + start + block, mask=inside, other=0, cache_modifier=".cg")
            tl.store(counts + start + block, total + tl.cumsum(own, axis=0) - own, mask=inside)
            total += tl.sum(own, axis=0)
        slot = tl.arange(0, 256)
        for start in range(total, width, 256):
            inside = start + slot < width
            at = row.to(tl.int64) * width + start + slot
            tl.store(INDICES + at, slot * 0 - 1, mask=inside)
            tl.store(LOG_WEIGHTS + at, slot * 0.0, mask=inside)


@triton.jit(do_not_specialize=COUNTERS)
def list_kernel(
    SPANS, LEVELS, PLAN, PREFIX, DRAWN, UNITS, DRAW, TABLE, COUNTS, LOGARITHMS, INDICES,
    LOG_WEIGHTS, sink, local, chunks, lists, q_len, width, state, first_list, fresh,
    PACK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write a chunk's part of a row's list and its log weights. Grid (chunks, rows)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    member, first, last, low, high = span_of(SPANS, row, sink, local, lists, q_len)
    row_state = mixed(tl.cast(state, tl.uint32), first_list + member)
    row_state = mixed(row_state, tl.where(fresh != 0, last - first, 0))
    threshold, taken, drawn, unit, tau, cap = rules_of(PLAN, DRAWN, UNITS, DRAW, row)
    if (chunk * (TILES * TILE) < last) & ((chunk + 1) * (TILES * TILE) > first):
        column = tl.arange(0, COLUMNS)
        room = taken - tl.load(PREFIX + (row.to(tl.int64) * chunks + chunk) * 2 + 1)
        before = tl.load(COUNTS + row.to(tl.int64) * chunks + chunk)
        levels = LEVELS + (row.to(tl.int64) * chunks + chunk) * (TILES * TILE // PACK)
        out = row.to(tl.int64) * width
        for step in range(TILES):
            word = (chunk * TILES + step) * COLUMNS + column
            sure, read, ties = words_read(
                levels + column, word, first, low, high, threshold, room, drawn, TABLE, row_state,
                unit, tau, cap, PACK,
            )  # fmt: skip
            ones = read | range_mask(word, first, low) | range_mask(word, high, last)
            number = popcount(ones)
            position = before + tl.cumsum(number, axis=0) - number
            for _ in range(tl.max(number, axis=0)):
                lane = tl.minimum(lowest(ones), LANES - 1)
                at = stored(levels, 0, lane, column, PACK)
                over = tl.minimum(tl.maximum(at * unit - tau, 0), cap)
                token = 32 * word + lane
                certain = (token < low) | (token >= high) | (((sure >> lane) & 1) != 0)
                weight = tl.where(certain, 0.0, tl.load(LOGARITHMS + over))
                there = (ones != 0) & (position < width)
                tl.store(INDICES + out + position, token, mask=there)
                tl.store(LOG_WEIGHTS + out + position, weight, mask=there)
                ones = ones & (ones - 1)
                position += 1
            before += tl.sum(number, axis=0)
            room -= ties
            levels += TILE // PACK

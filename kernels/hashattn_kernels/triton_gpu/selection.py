"""From codes to token lists: histogram of levels, threshold, compaction.

Two launches. A program takes a chunk of one list's tokens; the last chunk to finish turns the
histograms into a threshold and into the position at which every chunk writes its tokens. All sizes
are read from memory, so one captured graph serves every step. Nothing depends on the order in which
programs run: the lists are a pure function of the codes.
"""

import triton
import triton.language as tl

from .bits import emit, popcount, range_mask, shift_left
from .scoring import COLUMNS, LANES, code_masks, level, row_range

TILE = tl.constexpr(4096)


@triton.jit
def carry_save(a, b, c):
    """Sum and carry of three bits, in 32 places at once."""
    half = a ^ b
    return half ^ c, (a & b) | (half & c)


@triton.jit
def histogram_kernel(
    QUERIES, KEYS, SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES,
    key_batch, key_head, sink, local, chunks, lists, share, q_len, width,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr,
    QUERY_WORDS: tl.constexpr, HOT: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the levels of a chunk; the last chunk of a row plans its list.

    A thread owns a column of 32 tokens. It adds the one-hot words 1 << level (HOT of them) with
    carry-save adders, as a positional popcount: plane p holds digit p of 32 HOT counters.
    Grid (chunks, batch * lists * q_len). HISTOGRAM (rows, chunks, 32 HOT) int32: the level 32 HOT,
    if there is one, has the other candidates of a chunk.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // (lists * q_len)
    member = row // q_len % lists
    query = row % q_len
    _, _, low, high = row_range(SPANS, batch * q_len + query, sink, local)
    codes = QUERIES + (batch * lists + member) * (GROUP * q_len * QUERY_WORDS)
    masks = code_masks(codes, query, q_len, GROUP, SLOTS, WORDS, DIGITS, QUERY_WORDS != WORDS)
    column = tl.arange(0, COLUMNS)
    hot = 32 * tl.arange(0, HOT)[:, None]
    keys = KEYS + batch.to(tl.int64) * key_batch + (member // share).to(tl.int64) * key_head
    p0 = tl.zeros([HOT, COLUMNS], tl.int32)
    p1 = p0
    p2 = p0
    p3 = p0
    p4 = p0
    p5 = p0
    p6 = p0
    p7 = p0
    if (chunk * (TILES * TILE) < high) & ((chunk + 1) * (TILES * TILE) > low):
        tile = keys + (chunk * TILES).to(tl.int64) * (WORDS * TILE) + column
        for step in range(2 * TILES):  # half a tile: 16 tokens of each thread
            word = (chunk * TILES + step // 2) * COLUMNS + column
            valid = range_mask(word, low, high) >> (step % 2 * 16)
            for eight in tl.static_range(2):
                for four in tl.static_range(2):
                    for pair in tl.static_range(2):
                        lane = 8 * eight + 4 * four + 2 * pair
                        at = level(tile + lane * COLUMNS, masks, WORDS, DIGITS)
                        a = shift_left(((valid >> lane) & 1)[None, :], at[None, :] - hot)
                        at = level(tile + (lane + 1) * COLUMNS, masks, WORDS, DIGITS)
                        b = shift_left(((valid >> (lane + 1)) & 1)[None, :], at[None, :] - hot)
                        p0, two = carry_save(p0, a, b)
                        if pair == 0:
                            kept_two = two
                    p1, fours = carry_save(p1, kept_two, two)
                    if four == 0:
                        kept_four = fours
                p2, eights = carry_save(p2, kept_four, fours)
                if eight == 0:
                    kept_eight = eights
            p3, carry = carry_save(p3, kept_eight, eights)
            p4, carry = p4 ^ carry, p4 & carry
            p5, carry = p5 ^ carry, p5 & carry
            p6, carry = p6 ^ carry, p6 & carry
            p7 = p7 ^ carry
            tile += 16 * COLUMNS + (step % 2) * ((WORDS - 1) * TILE)
    place = tl.arange(0, 16)[None, :, None]
    counters = _digit(p0, place, 0) | _digit(p1, place, 1)
    counters |= _digit(p2, place, 2) | _digit(p3, place, 3)
    counters |= _digit(p4, place, 4) | _digit(p5, place, 5)
    counters |= _digit(p6, place, 6) | _digit(p7, place, 7)
    counts = tl.sum(counters, axis=2)  # two counters of 16 bits in a word
    out = HISTOGRAM + (row.to(tl.int64) * chunks + chunk) * (32 * HOT)
    out += hot + tl.arange(0, 16)[None, :]
    tl.store(out, counts & 0xFFFF)
    tl.store(out + 16, (counts >> 16) & 0xFFFF)
    plan_when_last(
        SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, batch * q_len + query,
        sink, local, chunks, width, 32 * HOT, TILES * TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def wide_histogram_kernel(
    QUERIES, KEYS, SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES,
    key_batch, key_head, sink, local, chunks, lists, share, q_len, width,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr,
    QUERY_WORDS: tl.constexpr, HOT: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """histogram_kernel written simply: for more levels than registers hold, and to test it by."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // (lists * q_len)
    member = row // q_len % lists
    query = row % q_len
    _, _, low, high = row_range(SPANS, batch * q_len + query, sink, local)
    codes = QUERIES + (batch * lists + member) * (GROUP * q_len * QUERY_WORDS)
    masks = code_masks(codes, query, q_len, GROUP, SLOTS, WORDS, DIGITS, QUERY_WORDS != WORDS)
    column = tl.arange(0, COLUMNS * 8)  # 8 rows of a tile at a time
    keys = KEYS + batch.to(tl.int64) * key_batch + (member // share).to(tl.int64) * key_head
    counts = tl.zeros([32 * HOT], tl.int32)
    for step in range(TILES):
        tile = chunk * TILES + step
        if (tile * TILE < high) & ((tile + 1) * TILE > low):
            for start in range(0, TILE, 8 * COLUMNS):
                place = start + column
                token = tile * TILE + place % COLUMNS * LANES + place // COLUMNS
                at = level(keys + tile.to(tl.int64) * (WORDS * TILE) + place, masks, WORDS, DIGITS)
                counted = (token >= low) & (token < high) & (at < 32 * HOT)
                counts += tl.histogram(tl.where(counted, at, 0), 32 * HOT, mask=counted)
    out = HISTOGRAM + (row.to(tl.int64) * chunks + chunk) * (32 * HOT)
    tl.store(out + tl.arange(0, 32 * HOT), counts)
    plan_when_last(
        SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, batch * q_len + query,
        sink, local, chunks, width, 32 * HOT, TILES * TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def _digit(plane, place, digit: tl.constexpr):
    """The bits `place` and `place` + 16 of a plane, as digits of the two counters of a word."""
    return ((plane[:, None, :] >> place) & 0x00010001) << digit


@triton.jit
def plan_when_last(
    SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, query, sink, local, chunks, width,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn a row's histograms into its plan, in the program that finishes last.

    PLAN (rows, 4): threshold, how many tokens at it are taken, how many in all, and how many at the
    threshold are left. PREFIX (rows, chunks, 2): tokens below and at it in the chunks before. Slots
    of INDICES (rows, width) after the list get -1.
    """
    tl.debug_barrier()  # the whole chunk is stored before it counts as done
    done = tl.atomic_add(DONE + row, 1, sem="acq_rel", scope="gpu")
    if done == chunks - 1:
        tl.store(DONE + row, 0)  # ready for the next launch
        first, last, low, high = row_range(SPANS, query, sink, local)
        heavy = tl.minimum(tl.load(HEAVY + row), high - low).to(tl.int32)
        level_of = tl.arange(0, BINS)
        histogram = HISTOGRAM + row.to(tl.int64) * chunks * BINS
        block = tl.arange(0, BLOCK)
        totals = tl.zeros([BINS], tl.int32)
        for start in range(0, chunks, BLOCK):
            at = histogram + (start + block)[:, None] * BINS + level_of[None, :]
            inside = (start + block < chunks)[:, None]
            totals += tl.sum(tl.load(at, mask=inside, other=0, cache_modifier=".cg"), axis=0)
        threshold = tl.sum((tl.cumsum(totals, axis=0) < heavy).to(tl.int32), axis=0)
        taken = heavy - tl.sum(tl.where(level_of < threshold, totals, 0), axis=0)
        tied = tl.sum(tl.where(level_of == threshold, totals, 0), axis=0)
        tied = tl.where(threshold == BINS, high - low - tl.sum(totals, axis=0), tied)
        tl.store(PLAN + 4 * row, threshold)
        tl.store(PLAN + 4 * row + 1, taken)
        tl.store(PLAN + 4 * row + 2, heavy)
        tl.store(PLAN + 4 * row + 3, tied - taken)
        less, equal = 0, 0
        for start in range(0, chunks, BLOCK):
            chunk = start + block
            at = histogram + chunk[:, None] * BINS + level_of[None, :]
            inside = (chunk < chunks)[:, None]
            counts = tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            under = tl.sum(tl.where(level_of[None, :] < threshold, counts, 0), axis=1)
            on = tl.sum(tl.where(level_of[None, :] == threshold, counts, 0), axis=1)
            free = tl.minimum(high, (chunk + 1) * CHUNK) - tl.maximum(low, chunk * CHUNK)
            on = tl.where(threshold == BINS, tl.maximum(free, 0) - tl.sum(counts, axis=1), on)
            prefix = PREFIX + (row.to(tl.int64) * chunks + chunk) * 2
            tl.store(prefix, less + tl.cumsum(under, axis=0) - under, mask=chunk < chunks)
            tl.store(prefix + 1, equal + tl.cumsum(on, axis=0) - on, mask=chunk < chunks)
            less += tl.sum(under, axis=0)
            equal += tl.sum(on, axis=0)
        slot = tl.arange(0, 256)
        for start in range(low - first + heavy + last - high, width, 256):
            out = INDICES + row.to(tl.int64) * width + start + slot
            tl.store(out, slot * 0 - 1, mask=start + slot < width)


@triton.jit
def compact_kernel(
    QUERIES, KEYS, SPANS, PLAN, PREFIX, INDICES,
    key_batch, key_head, sink, local, chunks, lists, share, q_len, width,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr,
    QUERY_WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write a chunk's part of a row's list: tokens below the threshold, and the first ones at it.

    A thread turns its 32 tokens into two words, below and up to the threshold; prefix sums run over
    words, not tokens. Grid (chunks, batch * lists * q_len).
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // (lists * q_len)
    member = row // q_len % lists
    query = row % q_len
    first, last, low, high = row_range(SPANS, batch * q_len + query, sink, local)
    if (chunk * (TILES * TILE) < last) & ((chunk + 1) * (TILES * TILE) > first):
        codes = QUERIES + (batch * lists + member) * (GROUP * q_len * QUERY_WORDS)
        masks = code_masks(codes, query, q_len, GROUP, SLOTS, WORDS, DIGITS, QUERY_WORDS != WORDS)
        threshold = tl.load(PLAN + 4 * row)
        taken = tl.load(PLAN + 4 * row + 1)
        heavy = tl.load(PLAN + 4 * row + 2)
        prefix = PREFIX + (row.to(tl.int64) * chunks + chunk) * 2
        less = tl.load(prefix)
        equal = tl.load(prefix + 1)
        column = tl.arange(0, COLUMNS)
        out = INDICES + row.to(tl.int64) * width
        keys = KEYS + batch.to(tl.int64) * key_batch + (member // share).to(tl.int64) * key_head
        tile = keys + (chunk * TILES).to(tl.int64) * (WORDS * TILE) + column
        for step in range(TILES):
            under = tl.zeros([COLUMNS], tl.int32)
            upto = tl.zeros([COLUMNS], tl.int32)
            for eight in range(0, LANES, 8):  # unrolling all 32 would take minutes to compile
                for lane in tl.static_range(8):
                    at = level(tile + (eight + lane) * COLUMNS, masks, WORDS, DIGITS)
                    under |= (at < threshold).to(tl.int32) << (eight + lane)
                    upto |= (at <= threshold).to(tl.int32) << (eight + lane)
            word = (chunk * TILES + step) * COLUMNS + column
            free = range_mask(word, low, high)
            under &= free
            on = upto & free & ~under
            counts = popcount(under) + (popcount(on) << 16)  # one scan for both
            before = tl.cumsum(counts, axis=0) - counts
            on_before = equal + (before >> 16)
            room = tl.minimum(tl.maximum(taken - on_before, 0), counts >> 16)
            rest = on
            cut = tl.where(room < (counts >> 16), room, 0)  # one word of a row at most
            for _ in range(tl.max(cut, axis=0)):
                rest = tl.where(cut > 0, rest & (rest - 1), rest)
                cut -= 1
            kept = tl.where(room == (counts >> 16), on, tl.where(room > 0, on & ~rest, 0))
            chosen = low - first + less + (before & 0xFFFF) + tl.minimum(on_before, taken)
            # sinks come before the chosen tokens, local ones after them; where a word holds several
            # kinds, the first decides where it starts
            start = 32 * word
            position = tl.where(start < low, tl.maximum(start - first, 0), chosen)
            behind = low - first + heavy + start - high
            position = tl.where(start >= high, behind, position)
            sinks = range_mask(word, first, low)
            locals_ = range_mask(word, high, last)
            emit(out, position, word, sinks | under | kept | locals_)
            total = tl.sum(counts, axis=0)
            less += total & 0xFFFF
            equal += total >> 16
            tile += WORDS * TILE

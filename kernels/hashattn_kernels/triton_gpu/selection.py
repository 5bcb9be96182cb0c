"""From codes to token lists: histograms of the levels' digits, threshold, compaction.

A program takes a chunk of one list's tokens. The first launch stores every token's level and counts
the highest digits (base 32); each further one counts the next digit of the levels that share those
of the threshold: one for up to 1,024 levels, none for up to 32. The last chunk to finish turns the
counts into the threshold's digit and into the position at which every chunk writes its tokens; then
compaction writes them. All sizes are read from memory, so one captured graph serves every step.
Nothing depends on the order in which programs run: the lists are a pure function of the codes.
"""

import triton
import triton.language as tl

from .bits import emit, part, popcount, push_sign, range_mask, shift_left
from .scoring import BINS, COLUMNS, LANES, code_masks, level, row_range

TILE = tl.constexpr(4096)


@triton.jit
def carry_save(a, b, c):
    """Sum and carry of three bits, in 32 places at once."""
    half = a ^ b
    return half ^ c, (a & b) | (half & c)


@triton.jit
def no_counts(TILES: tl.constexpr):
    """Counters at 0, as digits: a plane has one digit of 32 counters, and a thread's counters reach
    32 for each of its columns, one in every tile."""
    zeros = tl.zeros([COLUMNS], tl.int32)
    planes = (zeros, zeros, zeros, zeros, zeros, zeros)
    for _ in tl.static_range(TILES.bit_length() - 1):
        planes = planes + (zeros,)
    return planes


@triton.jit
def count_sixteen(planes, ones):
    """Count one bit of each of 16 words, with carry-save adders: a positional popcount."""
    counted = ()
    carries = ones
    for digit in tl.static_range(4):
        plane = planes[digit]
        over = ()
        for pair in tl.static_range(8 >> digit):
            plane, carry = carry_save(plane, carries[2 * pair], carries[2 * pair + 1])
            over = over + (carry,)
        counted = counted + (plane,)
        carries = over
    carry = carries[0]
    for digit in tl.static_range(4, len(planes)):
        counted = counted + (planes[digit] ^ carry,)
        carry = planes[digit] & carry
    return counted


@triton.jit
def store_counts(HISTOGRAM, planes):
    """The sums of all threads' counters, to HISTOGRAM (32) int32."""
    place = tl.arange(0, 16)[:, None]
    counters = tl.zeros([16, COLUMNS], tl.int32)
    for digit in tl.static_range(len(planes)):  # two counters of 16 bits in a word
        counters |= ((planes[digit][None, :] >> place) & 0x00010001) << digit
    counts = tl.sum(counters, axis=1)
    out = HISTOGRAM + tl.arange(0, 16)
    tl.store(out, counts & 0xFFFF)
    tl.store(out + 16, (counts >> 16) & 0xFFFF)


@triton.jit
def in_threads(x):
    """The 4 adjacent words of each thread, as a tuple of 4 tensors."""
    even, odd = tl.split(tl.reshape(x, [COLUMNS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def lanes_read():
    """Of half a tile's words, read 4 at a time: the first lane of each, of which the 3 after it are
    the same thread's, and its column."""
    word = tl.arange(0, 4 * COLUMNS)
    return word // COLUMNS * 4, word % COLUMNS


@triton.jit
def tiles_read(first, high, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """Tiles from token `first` on that begin before `high`: what lies behind need not be memory."""
    return TILES if WHOLE else tl.minimum(TILES, tl.cdiv(high - first, TILE))


@triton.jit
def counted(token, low, high):
    """1 for tokens in [low, high), else 0."""
    behind = (token - low).to(tl.uint32, bitcast=True)
    return (behind < (high - low).to(tl.uint32, bitcast=True)).to(tl.int32)


@triton.jit
def count_levels(
    planes, tile, masks, levels, first, low, high,
    WORDS: tl.constexpr, DIGITS: tl.constexpr, WEIGHED: tl.constexpr, SHIFT: tl.constexpr,
    PACK: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the levels of a chunk's tokens and count their highest digits. WHOLE: all tokens lie in
    [low, high), so that none must be left out."""
    lane, column = lanes_read()
    for step in range(2 * tiles_read(first, high, TILES, WHOLE)):  # 16 tokens of each thread
        token = first + column * LANES + lane
        ones = ()
        for later in tl.static_range(4):
            at = level(tile + (lane + later) * COLUMNS + column, masks, WORDS, DIGITS, WEIGHED)
            one = at * 0 + 1 if WHOLE else counted(token + later, low, high)
            ones = ones + in_threads(shift_left(one, at >> SHIFT))
            if later % PACK == 0:
                packed = at
            else:
                packed += at << (later % PACK * (32 // PACK))
            if later % PACK == PACK - 1:
                tl.store(levels + (lane + later) // PACK * COLUMNS + column, packed)
        planes = count_sixteen(planes, ones)
        tile += 16 * COLUMNS + step % 2 * ((WORDS - 1) * TILE)
        levels += 16 // PACK * COLUMNS
        first += 16 + step % 2 * (TILE - 32)
    return planes


@triton.jit
def histogram_kernel(
    QUERIES, KEYS, SPANS, HEAVY, LEVELS, HISTOGRAM, DONE, PLAN, PREFIX, INDICES,
    key_batch, key_head, sink, local, chunks, lists, share, q_len, width,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr,
    QUERY_WORDS: tl.constexpr, WEIGHED: tl.constexpr, SHIFT: tl.constexpr, PACK: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Levels of a chunk, and counts of level >> SHIFT; the last chunk of a row plans its list.

    Grid (chunks, batch * lists * q_len). LEVELS (rows, chunks, TILES, 32 / PACK, 128) int32, PACK
    levels in each. HISTOGRAM (rows, chunks, 32) int32: the digit 32, if there is one, has the other
    candidates of a chunk.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // (lists * q_len)
    member = row // q_len % lists
    query = row % q_len
    _, _, low, high = row_range(SPANS, batch * q_len + query, sink, local)
    first, last = chunk * (TILES * TILE), (chunk + 1) * (TILES * TILE)
    planes = no_counts(TILES)
    if (first < high) & (last > low):
        codes = QUERIES + (batch * lists + member) * (GROUP * q_len * QUERY_WORDS)
        masks = code_masks(codes, query, q_len, GROUP, SLOTS, WORDS, DIGITS, QUERY_WORDS != WORDS,
                           WEIGHED)  # fmt: skip
        keys = KEYS + batch.to(tl.int64) * key_batch + (member // share).to(tl.int64) * key_head
        tile = keys + (chunk * TILES).to(tl.int64) * (WORDS * TILE)
        levels = LEVELS + (row.to(tl.int64) * chunks + chunk) * (TILES * TILE // PACK)
        if (first >= low) & (last <= high):
            planes = count_levels(planes, tile, masks, levels, first, low, high,
                                  WORDS, DIGITS, WEIGHED, SHIFT, PACK, TILES, True)  # fmt: skip
        else:
            planes = count_levels(planes, tile, masks, levels, first, low, high,
                                  WORDS, DIGITS, WEIGHED, SHIFT, PACK, TILES, False)  # fmt: skip
    store_counts(HISTOGRAM + (row.to(tl.int64) * chunks + chunk) * BINS, planes)
    plan_when_last(
        SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, batch * q_len + query,
        sink, local, chunks, width, SHIFT, TILES * TILE, True, BLOCK,
    )  # fmt: skip


@triton.jit
def count_digits(
    planes, levels, first, base, low, high,
    SHIFT: tl.constexpr, PACK: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """count_levels of stored levels: of those from `base` on, the digit above SHIFT."""
    lane, column = lanes_read()
    for step in range(2 * tiles_read(first, high, TILES, WHOLE)):
        token = first + column * LANES + lane
        ones = ()
        for later in tl.static_range(4):
            if later % PACK == 0:
                packed = tl.load(levels + (lane + later) // PACK * COLUMNS + column)
            at = part(packed, later % PACK, PACK, -base)
            one = at * 0 + 1 if WHOLE else counted(token + later, low, high)
            ones = ones + in_threads(shift_left(one, at >> SHIFT))
        planes = count_sixteen(planes, ones)
        levels += 16 // PACK * COLUMNS
        first += 16 + step % 2 * (TILE - 32)
    return planes


@triton.jit
def refine_kernel(
    SPANS, HEAVY, LEVELS, HISTOGRAM, DONE, PLAN, PREFIX, INDICES,
    sink, local, chunks, lists, q_len, width,
    SHIFT: tl.constexpr, PACK: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The threshold's next digit: arguments and grid as of histogram_kernel, of which HISTOGRAM,
    PLAN and PREFIX are rewritten."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    span = row // (lists * q_len) * q_len + row % q_len
    _, _, low, high = row_range(SPANS, span, sink, local)
    first, last = chunk * (TILES * TILE), (chunk + 1) * (TILES * TILE)
    planes = no_counts(TILES)
    if (first < high) & (last > low):
        base = tl.load(PLAN + 4 * row)
        levels = LEVELS + (row.to(tl.int64) * chunks + chunk) * (TILES * TILE // PACK)
        if (first >= low) & (last <= high):
            planes = count_digits(planes, levels, first, base, low, high,
                                  SHIFT, PACK, TILES, True)  # fmt: skip
        else:
            planes = count_digits(planes, levels, first, base, low, high,
                                  SHIFT, PACK, TILES, False)  # fmt: skip
    store_counts(HISTOGRAM + (row.to(tl.int64) * chunks + chunk) * BINS, planes)
    plan_when_last(
        SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, span,
        sink, local, chunks, width, SHIFT, TILES * TILE, False, BLOCK,
    )  # fmt: skip


@triton.jit
def plan_when_last(
    SPANS, HEAVY, HISTOGRAM, DONE, PLAN, PREFIX, INDICES, row, query, sink, local, chunks, width,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn a row's histograms into its plan, in the program that finishes last.

    PLAN (rows, 4): threshold, how many tokens at it are taken, how many in all, and how many at the
    threshold are left; before the last digit, its place is that of the levels with its digits so
    far, the lowest of which it is. PREFIX (rows, chunks, 2): tokens below and at it in the chunks
    before. Slots of INDICES (rows, width) after the list get -1 with the FIRST digit.
    """
    tl.debug_barrier()  # the whole chunk is stored before it counts as done
    done = tl.atomic_add(DONE + row, 1, sem="acq_rel", scope="gpu")
    if done == chunks - 1:
        tl.store(DONE + row, 0)  # ready for the next launch
        first, last, low, high = row_range(SPANS, query, sink, local)
        heavy = tl.minimum(tl.load(HEAVY + row), high - low).to(tl.int32)
        if FIRST:
            base, wanted = 0, heavy
        else:
            base, wanted = tl.load(PLAN + 4 * row), tl.load(PLAN + 4 * row + 1)
        digit_of = tl.arange(0, BINS)
        histogram = HISTOGRAM + row.to(tl.int64) * chunks * BINS
        block = tl.arange(0, BLOCK)
        totals = tl.zeros([BINS], tl.int32)
        for start in range(0, chunks, BLOCK):
            at = histogram + (start + block)[:, None] * BINS + digit_of[None, :]
            inside = (start + block < chunks)[:, None]
            totals += tl.sum(tl.load(at, mask=inside, other=0, cache_modifier=".cg"), axis=0)
        digit = tl.sum((tl.cumsum(totals, axis=0) < wanted).to(tl.int32), axis=0)
        taken = wanted - tl.sum(tl.where(digit_of < digit, totals, 0), axis=0)
        tied = tl.sum(tl.where(digit_of == digit, totals, 0), axis=0)
        tied = tl.where(digit == BINS, high - low - tl.sum(totals, axis=0), tied)
        tl.debug_barrier()  # here and below: all threads have read what is rewritten
        tl.store(PLAN + 4 * row, base + (digit << SHIFT))
        tl.store(PLAN + 4 * row + 1, taken)
        tl.store(PLAN + 4 * row + 2, heavy)
        tl.store(PLAN + 4 * row + 3, tied - taken)
        less, equal = 0, 0
        for start in range(0, chunks, BLOCK):
            chunk = start + block
            inside = chunk < chunks
            at = histogram + chunk[:, None] * BINS + digit_of[None, :]
            counts = tl.load(at, mask=inside[:, None], other=0, cache_modifier=".cg")
            under = tl.sum(tl.where(digit_of[None, :] < digit, counts, 0), axis=1)
            on = tl.sum(tl.where(digit_of[None, :] == digit, counts, 0), axis=1)
            free = tl.minimum(high, (chunk + 1) * CHUNK) - tl.maximum(low, chunk * CHUNK)
            on = tl.where(digit == BINS, tl.maximum(free, 0) - tl.sum(counts, axis=1), on)
            prefix = PREFIX + (row.to(tl.int64) * chunks + chunk) * 2
            before = less + tl.cumsum(under, axis=0) - under
            if not FIRST:
                before += tl.load(prefix, mask=inside, other=0)
                tl.debug_barrier()
            tl.store(prefix, before, mask=inside)
            tl.store(prefix + 1, equal + tl.cumsum(on, axis=0) - on, mask=inside)
            less += tl.sum(under, axis=0)
            equal += tl.sum(on, axis=0)
        if FIRST:
            slot = tl.arange(0, 256)
            for start in range(low - first + heavy + last - high, width, 256):
                out = INDICES + row.to(tl.int64) * width + start + slot
                tl.store(out, slot * 0 - 1, mask=start + slot < width)


@triton.jit
def words_upto(levels, threshold, PACK: tl.constexpr):
    """Words of a tile's columns whose bits say which levels lie below, and up to, a threshold."""
    under = tl.zeros([COLUMNS], tl.int32)
    upto = tl.zeros([COLUMNS], tl.int32)
    for group in tl.static_range(LANES // PACK - 1, -1, -1):
        packed = tl.load(levels + group * COLUMNS)
        for place in tl.static_range(PACK - 1, -1, -1):
            under = push_sign(under, part(packed, place, PACK, -threshold))
            upto = push_sign(upto, part(packed, place, PACK, -threshold - 1))
    return under, upto


@triton.jit
def compact_kernel(
    SPANS, LEVELS, PLAN, PREFIX, INDICES, sink, local, chunks, lists, q_len, width,
    PACK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write a chunk's part of a row's list: tokens below the threshold, and the first ones at it.

    A thread turns its 32 tokens into two words, below and up to the threshold; prefix sums run over
    words, not tokens. Grid (chunks, batch * lists * q_len).
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    span = row // (lists * q_len) * q_len + row % q_len
    first, last, low, high = row_range(SPANS, span, sink, local)
    if (chunk * (TILES * TILE) < last) & ((chunk + 1) * (TILES * TILE) > first):
        threshold = tl.load(PLAN + 4 * row)
        taken = tl.load(PLAN + 4 * row + 1)
        heavy = tl.load(PLAN + 4 * row + 2)
        prefix = PREFIX + (row.to(tl.int64) * chunks + chunk) * 2
        less = tl.load(prefix)
        equal = tl.load(prefix + 1)
        column = tl.arange(0, COLUMNS)
        out = INDICES + row.to(tl.int64) * width
        levels = LEVELS + (row.to(tl.int64) * chunks + chunk) * (TILES * TILE // PACK) + column
        for step in range(TILES):
            under, upto = words_upto(levels, threshold, PACK)
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
            levels += TILE // PACK

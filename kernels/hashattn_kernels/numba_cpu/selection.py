"""Selection by Hamming distance: score, threshold by counting, compaction; no sort.

Distances are small integers, so the k-th smallest is found by bisection on their range: each step
counts, 64 codes at a time, those up to the middle. Ties at the threshold go to the lowest index.
"""

from functools import cache

import numpy as np

from ..reference import PARTS, SHARE
from .bits import TOGETHER, at_most, below, equal, popcount, trailing_zeros
from .lookup import TABLES, fill_tables, score
from .regions import Region, address_of, call_type, report, share_of
from .simd import at_address, kernel

WORD, BYTES = 32, 4  # bits and bytes of a word
SMALLEST, LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max  # normal numbers

CALL = call_type(
    "batch", "lists", "rows", "group", "grades", "most", "lists_per_code_head", "words", "width",
    "sink", "local", "tokens", "keys", "key_size", "key_batch", "key_head", "key_byte",
    "queries", "heavy", "spans", "out", "memory", "memory_size",
)  # fmt: skip

# `numbers` of survey_units and choose_units: sizes; of each mask three strides (batch, list, row)
# and the elements it spans
M_LISTS, M_ROWS, M_TOKENS, CANDIDATES, CANDIDATES_SIZE = 0, 1, 2, 3, 6
MANDATORY, MANDATORY_SIZE = 7, 10


@kernel
def query_bytes(words):
    """Bytes of a query's signs and weights, rounded up to whole lines of 64."""
    return (4 * words + 2 * WORD * words + 63) // 64 * 64


@kernel
def weigh_bits(queries, at, step, group, signs, weights):
    """One word's share of the group distance as a weight a bit: exact for any group size.

    Of `group` query bits at a position, let a be set and m = [2a > group] their majority. A key bit
    b adds min(a, group - a) + [b != m] |group - 2a| to the sum of the group's distances. The first
    term is the same for every key and is dropped. Weights of an even group are even, and halved.
    """
    halved = 1 if group % 2 == 0 else 0
    signs[0] = np.uint32(0)
    for bit in range(WORD):
        ones = 0
        for member in range(group):
            ones += (queries[at + member * step] >> np.uint32(bit)) & np.uint32(1)
        if 2 * ones > group:
            signs[0] |= np.uint32(1) << np.uint32(bit)
        weights[bit] = abs(group - 2 * ones) >> halved


@kernel
def magnitude(value):
    """|value|; of an infinity the largest number, of NaN 0."""
    size = abs(value)
    if size <= LARGEST:
        return size
    return LARGEST if size > LARGEST else np.float32(0)


@kernel
def grade(values, bits, grades, limit, shares, signs, weights):
    """Signs and weights of a query's pre-activations values[:bits] as reference.grade_bits has
    them; returns what a unit of weight stands for. shares: room for `bits` numbers."""
    largest, size, total = SMALLEST, np.float32(0), np.float64(0)
    for bit in range(bits):
        value = magnitude(values[bit])
        largest = value if value > largest else largest
        size += value
    for bit in range(bits):
        shares[bit] = np.rint(magnitude(values[bit]) / largest * np.float32(SHARE))
    for bit in range(bits):
        total += shares[bit]
    total = max(total, np.float64(1))
    room = np.int64(PARTS * limit - PARTS // 2 * bits)
    room = min(room, PARTS * ((1 << grades) - 1) * np.int64(total) // SHARE)
    # whole numbers below 2^53, and quotients of less than 2^8: the division is exact enough
    more, under = PARTS * total, 2 * PARTS * total
    for bit in range(bits):
        weights[bit] = np.uint16((2 * shares[bit] * room + more) / under)
    for word in range(bits // WORD):
        signs[word] = np.uint32(0)
        for bit in range(WORD):
            if values[WORD * word + bit] > 0:
                signs[word] |= np.uint32(1) << np.uint32(bit)
    per_sum = size / np.float32(limit - bits / 2)
    per_digit = largest / np.float32((1 << grades) - 1)
    return per_sum if per_sum > per_digit else per_digit


@kernel
def store_grades(signs, weights, words, grades, out, at):
    """Signs and the digits of weights as words, out[at:] (words, 1 + grades)."""
    for word in range(words):
        out[at] = signs[word]
        for plane in range(grades):
            digits = np.uint32(0)
            for bit in range(WORD):
                digit = (np.uint32(weights[WORD * word + bit]) >> np.uint32(plane)) & np.uint32(1)
                digits |= digit << np.uint32(bit)
            out[at + 1 + plane] = digits
        at += 1 + grades


@kernel
def grade_rows(values, grades, limit, shares, signs, weights, out):
    """Signs and weights' digits of values (rows, bits) into out (rows * words * (1 + grades),); the
    weights sum to at most `limit`. shares, signs and weights: room for a row's."""
    bits = values.shape[1]
    words = bits // WORD
    for row in range(len(values)):
        grade(values[row], bits, grades, limit, shares, signs, weights)
        store_grades(signs, weights, words, grades, out, row * words * (1 + grades))


@kernel
def load_grades(queries, at, grades, signs, weights):
    """Signs and weights of a graded query's word, whose digits follow its signs."""
    signs[0] = queries[at]
    for bit in range(WORD):
        weight = np.uint32(0)
        for plane in range(grades):
            digit = (queries[at + 1 + plane] >> np.uint32(bit)) & np.uint32(1)
            weight |= digit << np.uint32(plane)
        weights[bit] = weight


@kernel
def count_at_most(levels, size, threshold):
    """How many of levels[:size] are at most the threshold."""
    count, whole = 0, size // 64 * 64
    for i in range(0, whole, 64):
        count += popcount(at_most(levels, i, threshold))
    for i in range(whole, size):
        count += levels[i] <= threshold
    return np.int64(count)


@kernel
def kth_smallest(levels, size, k, most, low, smaller):
    """The k-th smallest of levels[:size] (k from 1; values up to `most`), and how many are less.

    low, smaller: what it is at least, and how many are less than that: 0 and 0, or what a smaller
    k had.
    """
    high = most
    while low < high:
        middle = (low + high) // 2
        count = count_at_most(levels, size, middle)
        if count >= k:
            high = middle
        else:
            low, smaller = middle + 1, count
    return low, smaller


@kernel
def lowest_bits(word, count):
    """`word` with all but its lowest `count` ones cleared."""
    result = np.uint64(0)
    while count > 0:
        lowest = word & (~word + np.uint64(1))
        result |= lowest
        word ^= lowest
        count -= 1
    return result


@kernel
def smallest_bits(levels, at, size, threshold, room):
    """Bit i says whether levels[at + i], before `size`, is less than the threshold or one of the
    first `room` that equal it; also returns how much room is left."""
    if at + TOGETHER <= size:
        bits = below(levels, at, threshold)
        if room > 0:
            tied = equal(levels, at, threshold)
            ties = np.int64(popcount(tied))
            if ties > room:
                tied, ties = lowest_bits(tied, room), room
            bits |= tied
            room -= ties
        return bits, room
    bits = np.uint64(0)
    for i in range(at, size):
        level = levels[i]
        if level < threshold or (level == threshold and room > 0):
            room -= level == threshold
            bits |= np.uint64(1) << np.uint64(i - at)
    return bits, room


@kernel
def write_bits(bits, first, out, to, stop):
    """Write first + i of each bit i, ascending, to out[to:stop] as far as there is room; returns
    the end. What lies behind it may be overwritten.

    Always four at a time where they fit: how many ones a word has, no processor predicts.
    """
    end = min(to + np.int64(popcount(bits)), stop)
    while to < end:
        if to + 4 <= stop:
            for i in range(4):
                out[to + i] = first + trailing_zeros(bits)
                bits &= bits - np.uint64(1)
            to += 4
        else:
            out[to] = first + trailing_zeros(bits)
            bits &= bits - np.uint64(1)
            to += 1
    return end


@kernel
def write_range(first, last, out, to):
    """Write first to last to out[to:]; returns the end."""
    for i in range(first, last):
        out[to] = i
        to += 1
    return to


@kernel
def take_smallest(levels, size, k, most, first, out, to, stop):
    """Write first + position of the k smallest levels, ascending, to out[to:]; returns the end.
    Up to `stop`, what lies behind it may be overwritten."""
    if k <= 0:
        return to
    if k >= size:
        return write_range(first, first + size, out, to)
    threshold, smaller = kth_smallest(levels, size, k, most, 0, 0)
    room = k - smaller
    for at in range(0, size, TOGETHER):
        bits, room = smallest_bits(levels, at, size, threshold, room)
        to = write_bits(bits, first + at, out, to, stop)
    return to


@kernel
def count_ones(mask):
    """Ones in an array of 0 and 1."""
    count = np.uint32(0)
    for i in range(len(mask)):
        count = np.uint32(count + mask[i])
    return np.int64(count)


@kernel
def count_free(allowed, fixed):
    """Tokens that are allowed and not fixed."""
    count = np.uint32(0)
    for i in range(len(allowed)):
        count = np.uint32(count + (allowed[i] & (fixed[i] ^ np.uint8(1))))
    return np.int64(count)


@kernel
def extremes(values, allowed, fixed, limits):
    """Lowest and highest value of tokens that are allowed and not fixed; the limits if none is."""
    low, high = top, bottom = limits[0], limits[1]
    # LLVM makes vectors of these selects, but not of min and max
    for i in range(len(values)):
        free = allowed[i] > fixed[i]
        lower = values[i] if free else top
        higher = values[i] if free else bottom
        low = lower if lower < low else low
        high = higher if higher > high else high
    return np.int64(low), np.int64(high)


@kernel
def to_levels(values, allowed, fixed, high, most, levels):
    """Levels: 0 where mandatory, 1 + (high - value) of other candidates, `most` elsewhere."""
    for i in range(len(values)):
        level = high + 1 - values[i] if allowed[i] else most
        levels[i] = 0 if fixed[i] else level


@kernel
def masks_of(numbers, candidates_at, mandatory_at):
    """The memory of both masks; numbers: see M_LISTS."""
    return (
        at_address(candidates_at, numbers[CANDIDATES_SIZE], np.uint8),
        at_address(mandatory_at, numbers[MANDATORY_SIZE], np.uint8),
    )


@kernel
def rows_of(numbers, candidates, mandatory, item, line, row):
    """A unit's row (n,) of each mask."""
    n = numbers[M_TOKENS]
    at = item * numbers[CANDIDATES] + line * numbers[CANDIDATES + 1]
    allowed = candidates[at + row * numbers[CANDIDATES + 2] :][:n]
    at = item * numbers[MANDATORY] + line * numbers[MANDATORY + 1]
    return allowed, mandatory[at + row * numbers[MANDATORY + 2] :][:n]


@kernel
def survey_units(numbers, scores_at, limits, candidates_at, mandatory_at, survey):
    """What `choose_units` needs to know of every unit: (batch, list, row).

    numbers: see M_LISTS; limits: highest and lowest number of the scores' type. survey[unit] =
    numbers of mandatory tokens and of other candidates, lowest and highest score of the latter.
    """
    lists, rows, n, units = numbers[M_LISTS], numbers[M_ROWS], numbers[M_TOKENS], len(survey)
    scores = at_address(scores_at, units * n, limits.dtype)
    candidates, mandatory = masks_of(numbers, candidates_at, mandatory_at)
    for unit in range(units):
        item, line, row = unit // (rows * lists), unit // rows % lists, unit % rows
        allowed, fixed = rows_of(numbers, candidates, mandatory, item, line, row)
        values = scores[unit * n : (unit + 1) * n]
        survey[unit, 0], survey[unit, 1] = count_ones(fixed), count_free(allowed, fixed)
        survey[unit, 2], survey[unit, 3] = extremes(values, allowed, fixed, limits)


@kernel
def choose_units(numbers, scores_at, limits, candidates_at, mandatory_at, k, survey, out, levels):
    """All `mandatory` tokens and the k best other candidates of every unit to out[unit].

    They are the tokens of the lowest levels (`to_levels`); mandatory ones have the lowest.
    """
    lists, rows, n, units = numbers[M_LISTS], numbers[M_ROWS], numbers[M_TOKENS], len(survey)
    scores = at_address(scores_at, units * n, limits.dtype)
    candidates, mandatory = masks_of(numbers, candidates_at, mandatory_at)
    for unit in range(units):
        item, line, row = unit // (rows * lists), unit // rows % lists, unit % rows
        allowed, fixed = rows_of(numbers, candidates, mandatory, item, line, row)
        always, free, low, high = survey[unit]
        most = high - low + 2 if free else 1
        to_levels(scores[unit * n : (unit + 1) * n], allowed, fixed, high, most, levels)
        total = always + min(k[unit], free)
        end = take_smallest(levels, n, total, most, 0, out[unit], 0, out.shape[1])
        for i in range(end, out.shape[1]):
            out[unit, i] = -1


@kernel
def smallest_units(levels, k, out):
    """out[i] = positions of the k smallest of levels[i], bytes, ascending."""
    for i in range(len(levels)):
        take_smallest(levels[i], levels.shape[1], k, 255, 0, out[i], 0, out.shape[1])


@kernel
def weigh_query(call, unit, queries, signs, weights):
    """Signs and weights of a unit's query, from its codes."""
    rows, words, group, grades = call.rows, call.words, call.group, call.grades
    row, line, item = unit % rows, unit // rows % call.lists, unit // (rows * call.lists)
    for word in range(words):
        at = ((item * call.lists + line) * group * rows + row) * words + word
        if grades:
            load_grades(queries, at * (1 + grades), grades, signs[word:], weights[WORD * word :])
        else:
            weigh_bits(queries, at, rows * words, group, signs[word:], weights[WORD * word :])


@kernel
def score_list(call, signs, weights, keys, base, size, tables, levels):
    """Distances of a query from `size` keys, from byte `base` of the codes on, to `levels`."""
    for word in range(call.words):
        fill_tables(signs[word], weights, WORD * word, tables, word * BYTES * TABLES)
    score(keys, base, call.key_byte, BYTES * call.words, tables, levels, 0, size)


@kernel
def select_list(call, signs, weights, first, last, heavy, keys, base, tables, levels, out, at):
    """Write a list to out[at : at + width]: the first `sink` and last `local` of the tokens first
    to last and the `heavy` best of the others, ascending, padded with -1; returns its length."""
    low = min(first + call.sink, last)
    high = max(last - call.local, low)
    size = high - low
    k = min(heavy, size)
    if 0 < k < size:
        score_list(call, signs, weights, keys, base + low, size, tables, levels)
    end = write_range(first, low, out, at)
    end = take_smallest(levels, size, k, call.most, low, out, end, at + call.width)
    end = write_range(high, last, out, end)
    for i in range(end, at + call.width):
        out[i] = -1
    return end - at


@kernel
def select_share(data, kind):
    """Select for this thread's units: (batch, list, row), the last fastest.

    data: the address of a CALL. queries (batch, lists * group, rows, words), or (batch, lists,
    rows, words, 1 + grades) where grades is not 0, are uint32; keys are the codes' bytes, with
    strides of their own, tokens side by side. heavy (batch, lists, rows) int64. spans (batch, rows,
    2) int64: the tokens that a row sees. out (batch, lists, rows, width) int32: see `select_list`.
    most: the largest distance there can be; kind: a type that holds it.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    batch, lists, rows, group = call.batch, call.lists, call.rows, call.group
    grades, words, width = call.grades, call.words, call.width
    queries = at_address(call.queries, batch * lists * group * rows * words * (1 + grades),
                         np.uint32)  # fmt: skip
    keys = at_address(call.keys, call.key_size, np.uint8)
    heavy = at_address(call.heavy, batch * lists * rows, np.int64)
    spans = at_address(call.spans, 2 * batch * rows, np.int64)
    out = at_address(call.out, batch * lists * rows * width, np.int32)
    memory = call.memory + thread * call.memory_size
    signs = at_address(memory, words, np.uint32)
    weights = at_address(memory + 4 * words, WORD * words, np.uint16)
    memory += query_bytes(words)
    tables = at_address(memory, BYTES * words * TABLES, np.uint8)
    levels = at_address(memory + BYTES * words * TABLES, call.tokens, kind)
    for unit in range(start, stop):
        row, line, item = unit % rows, unit // rows % lists, unit // (rows * lists)
        first, last = spans[2 * (item * rows + row)], spans[2 * (item * rows + row) + 1]
        base = item * call.key_batch + line // call.lists_per_code_head * call.key_head
        weigh_query(call, unit, queries, signs, weights)
        select_list(call, signs, weights, first, last, heavy[unit], keys, base, tables, levels,
                    out, unit * width)  # fmt: skip
    report(call.results, call.threads, thread, 0)


@cache
def select_region(wide: bool) -> Region:
    """The compiled region for distances up to 255, or up to 65,535 if wide."""
    kind = np.uint16 if wide else np.uint8

    def body(data):
        select_share(data, kind)

    return Region(body)

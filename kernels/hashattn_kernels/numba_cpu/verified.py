"""A list that doubles until a rule predicts no error above its tolerance (rule.Rule).

The tokens' distances are found once. Of a list that is ranked, a longer one's threshold is searched
from a shorter one's on, and what it adds is read into the softmax that it has come to: how far that
moves the output, and how much weight it brought, is what the rule looks at. A list of which a part
is drawn is read anew, and its error bar made with it (error_bars).
"""

import math

import numpy as np

from ..rule import LEAST_HEAVY, LOG_LIMIT, TERMS
from .attention import attend_tokens, begin, total_of, workspace
from .bits import TOGETHER
from .error_bars import SUMS, bar_and_drawn, begin_sample, sample_bytes, sample_room, sum_of
from .sampling import prepare_draws, write_sample
from .selection import kth_smallest, score_list, smallest_bits, write_bits, write_range
from .simd import LANES, at_address, fma, kernel, load, multiply, splat, store, subtract


@kernel
def verifying_room(memory, tokens, group, value_dim):
    """A thread's arrays for `read_verified`: a bit of each token that is read, what was read before
    (of each head its output, its top and its total), and the tokens in the order in which they are
    read."""
    words = (tokens + TOGETHER - 1) // TOGETHER
    marks = at_address(memory, words, np.uint64)
    size = group * (value_dim + 2) + 2 * LANES
    before = at_address(memory + 8 * words, size, np.float32)
    return marks, before, at_address(memory + 8 * words + 4 * size, tokens, np.int32)


def verifying_bytes(tokens: int, group: int, value_dim: int) -> int:
    """Bytes of `verifying_room`, and of `sample_room`, which takes its place where lists are
    drawn."""
    ranked = 8 * -(-tokens // TOGETHER) + 4 * (group * (value_dim + 2) + 2 * LANES + tokens)
    return max(ranked, sample_bytes(group, value_dim))


@kernel
def add_best(levels, size, k, most, threshold, smaller, marks, low, order, end):
    """Mark the k smallest levels, and append low + position of those that were not marked to
    order[end:]; returns the threshold, how many are below it (both as of the marked ones before),
    and the new end."""
    threshold, smaller = kth_smallest(levels, size, k, most, threshold, smaller)
    room = k - smaller
    for at in range(0, size, TOGETHER):
        bits, room = smallest_bits(levels, at, size, threshold, room)
        new = bits & ~marks[at // TOGETHER]
        marks[at // TOGETHER] = bits
        end = write_bits(new, low + at, order, end, len(order))
    return threshold, smaller, end


@kernel
def begin_best(levels, size, k, most, marks, low, order, end):
    """`add_best` of k // 2 and of k, to unmarked tokens; also returns where the first half ends.

    Both at once, before attention to the first drives the levels from the caches.
    """
    threshold, smaller = kth_smallest(levels, size, k // 2, most, 0, 0)
    further, before = kth_smallest(levels, size, k, most, threshold, smaller)
    better_room, room = k // 2 - smaller, k - before
    half, last = end + k // 2, end + k
    to = half
    for at in range(0, size, TOGETHER):
        better, better_room = smallest_bits(levels, at, size, threshold, better_room)
        bits, room = smallest_bits(levels, at, size, further, room)
        marks[at // TOGETHER] = bits
        end = write_bits(better, low + at, order, end, half)
        to = write_bits(bits & ~better, low + at, order, to, last)
    return further, before, half, last


@kernel
def standing(static, work, state, member, room):
    """Top and total of a unit's head. room: for eight numbers."""
    lane = member % static.heads
    at = state + 16 * (member // static.heads)
    store(room, 0, total_of(static, load(work, at + 8)))
    return work[at + lane], room[lane]


@kernel
def remember(static, call, work, before):
    """Keep the outputs, tops and totals of a unit's heads."""
    _, _, state, o = workspace(static, call)
    dim = static.value_dim
    room = before[call.group * (dim + 2) :]
    for member in range(call.group):
        top, total = standing(static, work, state, member, room)
        inverse = splat(np.float32(1) / total)
        at, source = member * (dim + 2), o + member * dim
        for d in range(0, dim, LANES):
            store(before, at + d, multiply(load(work, source + d), inverse))
        before[at + dim], before[at + dim + 1] = top, total


@kernel
def limited(value):
    """The logarithm of a statistic within what the rule was calibrated for; NaN stays."""
    if value > LOG_LIMIT:
        return LOG_LIMIT
    return -LOG_LIMIT if value < -LOG_LIMIT else value


@kernel
def predicts_more(call, rule, head, level, first, second):
    """Whether the rule predicts an error above its tolerance, or none, by two statistics' logs."""
    of = (head * call.rule_levels + min(level, call.rule_levels - 1)) * TERMS
    predicted = rule[of] + rule[of + 1] * limited(first) + rule[of + 2] * limited(second)
    return not predicted <= call.limit  # NaN is not


@kernel
def exceeds(static, call, work, before, rule, head, level, unread, added):
    """Whether the rule predicts an error above its tolerance for one of a unit's heads, or none.

    unread, added: tokens that are not read, and those that came since `remember`.
    """
    _, _, state, o = workspace(static, call)
    dim = static.value_dim
    room = before[call.group * (dim + 2) :]
    per_token = math.log(np.float64(unread) / np.float64(added))
    for member in range(call.group):
        top, total = standing(static, work, state, member, room)
        inverse = splat(np.float32(1) / total)
        at, source = member * (dim + 2), o + member * dim
        ways = lengths = splat(np.float32(0))
        for d in range(0, dim, LANES):
            now = multiply(load(work, source + d), inverse)
            way = subtract(now, load(before, at + d))
            ways, lengths = fma(way, way, ways), fma(now, now, lengths)
        moved, length = sum_of(ways, room), sum_of(lengths, room)
        top_before, total_before = np.float64(before[at + dim]), np.float64(before[at + dim + 1])
        share = total_before * math.exp(top_before - np.float64(top)) / np.float64(total)
        edge = per_token + math.log(max(1 - share, 0.0))
        change = math.log(moved / length) / 2
        if predicts_more(call, rule, head + member, level, edge, change):
            return True
    return False


@kernel
def sample_exceeds(static, call, work, rule, head, level, room):
    """`exceeds` of a list that was drawn, whose sums are in `room`."""
    passes, _, state, o = workspace(static, call)
    totals = room[0]
    for number in range(passes):
        at = SUMS * LANES * number
        store(totals, at + 3 * LANES, load(work, state + 16 * number + 8))
        for i in range(at, at + SUMS * LANES, LANES):
            store(totals, i, total_of(static, load(totals, i)))
    for member in range(call.group):
        bar, drawn = bar_and_drawn(static, member, work, o, room)
        if predicts_more(call, rule, head + member, level, bar, drawn):
            return True
    return False


@kernel
def read_verified(static, call, signs, weights, first, last, heavy, level, head, codes, base,
                  tables, levels, rule, marks, before, order, indices, none, at, work, keys, key,
                  values, value, softcap, scratch):  # fmt: skip
    """Read a list of `heavy` tokens, twice as many at each `level`, until the rule is content or
    all is read; into the unit's softmax, that `begin` has made. none: no log weights.

    Writes the tokens to indices[at:], ascending; returns how many, and the level that was reached.
    """
    low = min(first + call.sink, last)
    high = max(last - call.local, low)
    size, dense, read, threshold, smaller = high - low, call.rule_levels, 0, 0, 0
    least = max(heavy, LEAST_HEAVY)
    k = min(least << level, size)
    if k >= size:
        level = dense
    end = write_range(first, low, order, 0)
    end = write_range(high, last, order, end)
    if level < dense:
        score_list(call, signs, weights, codes, base + low, size, tables, levels)
        threshold, smaller, read, end = begin_best(levels, size, k, call.most, marks, low, order,
                                                   end)  # fmt: skip
        attend_tokens(static, call, order, none, 0, 0, read, work, keys, key, values, value,
                      softcap, scratch, None)  # fmt: skip
    else:
        marks[: (size + TOGETHER - 1) // TOGETHER] = 0
    while level < dense:
        remember(static, call, work, before)
        attend_tokens(static, call, order, none, 0, read, end, work, keys, key, values, value,
                      softcap, scratch, None)  # fmt: skip
        added, read = end - read, end
        if not exceeds(static, call, work, before, rule, head, level, last - first - end, added):
            break
        level += 1
        k = min(least << level, size)
        if k >= size:
            level = dense
        if level < dense:
            threshold, smaller, end = add_best(levels, size, k, call.most, threshold, smaller,
                                               marks, low, order, end)  # fmt: skip
    if level == dense:
        for start in range(0, size, TOGETHER):
            unread = ~marks[start // TOGETHER]
            if start + TOGETHER > size:
                unread &= (np.uint64(1) << np.uint64(size - start)) - np.uint64(1)
            end = write_bits(unread, low + start, order, end, len(order))
        if read < end:
            attend_tokens(static, call, order, none, 0, read, end, work, keys, key, values, value,
                          softcap, scratch, None)  # fmt: skip
        return write_range(first, last, indices, at) - at, level
    to = write_range(first, low, indices, at)
    for start in range(0, size, TOGETHER):
        to = write_bits(marks[start // TOGETHER], low + start, indices, to, at + call.width)
    return write_range(high, last, indices, to) - at, level


@kernel
def read_drawn_verified(
    static, call, signs, weights, line, first, last, heavy, share, level, head, unit, codes, base,
    tables, levels, highest, begins, counts, of_level, coins, chances, logarithms, rule, room,
    indices, log_weights, at, queries, q, scale, work, keys, key, values, value, softcap, scratch,
):  # fmt: skip
    """`read_verified` with a share of the heavy tokens drawn; also writes the log weights.

    unit: what a unit of distance costs. room: as of `sample_room`.
    """
    low = min(first + call.sink, last)
    size, dense = max(last - call.local, low) - low, call.rule_levels
    stride = np.int64(0)
    passes, _, _, _ = workspace(static, call)
    while True:
        k = max(heavy, LEAST_HEAVY) << level
        if level >= dense or k >= size:
            level, k, drawn, asked = dense, size, np.int64(0), np.int64(0)
        else:
            if stride == 0:
                score_list(call, signs, weights, codes, base + low, size, tables, levels)
                stride = prepare_draws(call, line, last - first, levels, size, begins, counts)
            drawn, asked = np.int64(np.rint(np.float64(k) * share)), stride
        to = write_sample(
            call, first, last, k - drawn, drawn, unit, levels, asked, highest, begins, counts,
            of_level, coins, chances, logarithms, indices, log_weights, at,
        )  # fmt: skip
        begin(static, call, queries, q, scale, work)
        begin_sample(static, passes, room)
        attend_tokens(static, call, indices, log_weights, at, 0, to - at, work, keys, key, values,
                      value, softcap, scratch, room)  # fmt: skip
        if level == dense:
            return to - at, level
        if not sample_exceeds(static, call, work, rule, head, level, room):
            return to - at, level
        level += 1


@kernel
def read_growing(
    static, call, unit, line, item, head, first, last, heavy, price, signs, weights, codes, base,
    tables, levels, highest, begins, counts, of_level, coins, chances, logarithms, indices,
    log_weights, memory, queries, q, scale, work, keys, key, values, value, softcap, scratch,
):  # fmt: skip
    """step.read_once of a list that grows; also notes its length and level. memory: `verifying_
    bytes` of the thread's."""
    rule = at_address(call.rule, call.lists * call.group * call.rule_levels * TERMS, np.float32)
    level, at = at_address(call.start, call.lists, np.int64)[line], unit * call.width
    if call.log_weights != 0:
        share = at_address(call.drawn, call.lists, np.float64)[line]
        room = sample_room(memory, call.group, static.value_dim)
        length, level = read_drawn_verified(
            static, call, signs, weights, line, first, last, heavy, share, level, head, price,
            codes, base, tables, levels, highest, begins, counts, of_level, coins, chances,
            logarithms, rule, room, indices, log_weights, at, queries, q, scale, work, keys, key,
            values, value, softcap, scratch,
        )  # fmt: skip
    else:
        begin(static, call, queries, q, scale, work)
        marks, before, order = verifying_room(memory, call.tokens, call.group, static.value_dim)
        length, level = read_verified(
            static, call, signs, weights, first, last, heavy, level, head, codes, base, tables,
            levels, rule, marks, before, order, indices, log_weights, at, work, keys, key, values,
            value, softcap, scratch,
        )  # fmt: skip
    units = call.batch * call.lists
    at_address(call.reached, units, np.int64)[unit] = level
    at_address(call.lengths, units, np.int64)[unit] = length
    return length

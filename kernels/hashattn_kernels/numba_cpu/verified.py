"""A list that doubles until a rule predicts no error above its tolerance (rule.Rule).

The tokens' distances are found once. What a list adds is read into the softmax that it has come to,
and how far that moves the output, and how much weight it brought, is what the rule looks at.
"""

import math

import numpy as np

from ..rule import LEAST_HEAVY, LOG_LIMIT, TERMS
from .attention import attend_tokens, total_of, workspace
from .selection import score_list, take_smallest, write_list
from .simd import LANES, at_address, kernel, load, store


@kernel
def verifying_room(memory, tokens, group, value_dim):
    """A thread's arrays for `read_verified`: what was read before (of each head its sums, its top
    and its total), the tokens in the order in which they are read, and whether each one was."""
    size = group * (value_dim + 2) + LANES
    before = at_address(memory, size, np.float32)
    order = at_address(memory + 4 * size, tokens, np.int32)
    return before, order, at_address(memory + 4 * (size + tokens), tokens, np.uint8)


def verifying_bytes(tokens: int, group: int, value_dim: int) -> int:
    """Bytes of `verifying_room`."""
    return 4 * (group * (value_dim + 2) + LANES) + 5 * tokens


@kernel
def add_best(levels, size, k, most, low, taken, order, end, found, at):
    """Append low + position of those of the k smallest levels that were not taken to order[end:];
    returns the new end. found[at:]: room for k."""
    for i in range(at, take_smallest(levels, size, k, most, 0, found, at)):
        position = found[i]
        if taken[position] == 0:
            taken[position] = 1
            order[end] = low + position
            end += 1
    return end


@kernel
def remember(static, call, work, before):
    """Copy the sums, tops and totals of a unit's heads to `before`."""
    _, _, state, o = workspace(static, call)
    lanes, dim = call.group * (static.value_dim + 2), static.value_dim
    for member in range(call.group):
        number, lane = member // static.heads, member % static.heads
        store(before, lanes, total_of(static, load(work, state + 16 * number + 8)))
        at = member * (dim + 2)
        for d in range(dim):
            before[at + d] = work[o + member * dim + d]
        before[at + dim] = work[state + 16 * number + lane]
        before[at + dim + 1] = before[lanes + lane]


@kernel
def limited(value):
    """The logarithm of a statistic within what the rule was calibrated for; NaN stays."""
    if value > LOG_LIMIT:
        return LOG_LIMIT
    return -LOG_LIMIT if value < -LOG_LIMIT else value


@kernel
def exceeds(static, call, work, before, rule, head, level, unread, added):
    """Whether the rule predicts an error above its tolerance for one of a unit's heads, or none.

    unread, added: tokens that are not read, and those that came since `remember`.
    """
    _, _, state, o = workspace(static, call)
    lanes, dim = call.group * (static.value_dim + 2), static.value_dim
    for member in range(call.group):
        number, lane = member // static.heads, member % static.heads
        store(before, lanes, total_of(static, load(work, state + 16 * number + 8)))
        top, total = np.float64(work[state + 16 * number + lane]), np.float64(before[lanes + lane])
        at = member * (dim + 2)
        top_before, total_before = np.float64(before[at + dim]), np.float64(before[at + dim + 1])
        share = total_before * math.exp(top_before - top) / total
        moved = length = np.float64(0)
        for d in range(dim):
            now = np.float64(work[o + member * dim + d]) / total
            way = now - np.float64(before[at + d]) / total_before
            moved += way * way
            length += now * now
        edge = math.log(np.float64(unread) / np.float64(added)) + math.log(max(1 - share, 0.0))
        change = (math.log(moved) - math.log(length)) / 2
        of = ((head + member) * call.rule_levels + min(level, call.rule_levels - 1)) * TERMS
        predicted = rule[of] + rule[of + 1] * limited(edge) + rule[of + 2] * limited(change)
        if not predicted <= call.limit:  # NaN is not
            return True
    return False


@kernel
def read_verified(static, call, signs, weights, first, last, heavy, level, head, codes, base,
                  tables, levels, rule, before, order, taken, indices, none, at, work, keys, key,
                  values, value, softcap, scratch):  # fmt: skip
    """Read a list of `heavy` tokens, twice as many at each `level`, until the rule is content or
    all is read; into the unit's softmax, that `begin` has made. none: no log weights.

    Writes the tokens to indices[at:], ascending; returns how many, and the level that was reached.
    """
    low = min(first + call.sink, last)
    high = max(last - call.local, low)
    size, dense, end, read = high - low, call.rule_levels, 0, 0
    least = max(heavy, LEAST_HEAVY)
    k = min(least << level, size)
    if k >= size:
        level = dense
    for token in range(first, low):
        order[end] = token
        end += 1
    for token in range(high, last):
        order[end] = token
        end += 1
    taken[:size] = 0
    if level < dense:
        score_list(call, signs, weights, codes, base + low, size, tables, levels)
        end = add_best(levels, size, k // 2, call.most, low, taken, order, end, indices, at)
        attend_tokens(static, call, order, none, 0, 0, end, work, keys, key, values, value, softcap,
                      scratch)  # fmt: skip
        read = end
    while level < dense:
        remember(static, call, work, before)
        end = add_best(levels, size, k, call.most, low, taken, order, end, indices, at)
        attend_tokens(static, call, order, none, 0, read, end, work, keys, key, values, value,
                      softcap, scratch)  # fmt: skip
        added, read = end - read, end
        if not exceeds(static, call, work, before, rule, head, level, last - first - end, added):
            break
        level += 1
        k = min(least << level, size)
        if k >= size:
            level = dense
    if level == dense:
        for position in range(size):
            if taken[position] == 0:
                order[end] = low + position
                end += 1
        if read < end:
            attend_tokens(static, call, order, none, 0, read, end, work, keys, key, values, value,
                          softcap, scratch)  # fmt: skip
        k = size
    return write_list(levels, k, call.most, first, low, high, last, indices, at) - at, level

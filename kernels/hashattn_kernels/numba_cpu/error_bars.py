"""How far a list that was drawn may be from dense attention, by its own sample.

As hashattn.attention.error_bars has it, after attention to the list: with a token's weight w and
the probability p that it was drawn with, the variance is sum c |v - o|^2 of c = (1 - p) w^2, which
is sum c |v|^2 - 2 o sum c v + |o|^2 sum c, so that one more pass over the tokens drawn gives it.
"""

import math

import numpy as np

from .attention import cap, find_rows, total_of, workspace
from .passes import (
    KEYS,
    VALUES,
    add_values_of_four,
    add_values_of_one,
    logits_of_four,
    logits_of_one,
)
from .simd import (
    LANES,
    add,
    at_address,
    exp,
    fma,
    kernel,
    load,
    load_state,
    multiply,
    splat,
    store,
    subtract,
)
from .static import LONGEST

HEADS = 4  # of a pass, at most
SUMS = 4  # over tokens drawn of c, of c |v|^2 and of w, and over all of w


@kernel
def measuring_room(memory, tokens, group, value_dim):
    """A thread's arrays for `measure_sample`: the tokens drawn, their log weights, sums over them,
    of each pass SUMS vectors and of each head one of the values, and a block's 1 - p and |v|^2."""
    drawn = at_address(memory, tokens, np.int32)
    memory += 4 * tokens
    added = at_address(memory, tokens, np.float32)
    memory += 4 * tokens
    passes = group + HEADS - 1
    totals = at_address(memory, passes * SUMS * LANES, np.float32)
    memory += 4 * passes * SUMS * LANES
    sums = at_address(memory, passes * value_dim, np.float32)
    memory += 4 * passes * value_dim
    chances = at_address(memory, HEADS * LONGEST, np.float32)
    return (
        drawn,
        added,
        totals,
        sums,
        chances,
        at_address(memory + 4 * HEADS * LONGEST, HEADS * LONGEST, np.float32),
    )


def measuring_bytes(tokens: int, group: int, value_dim: int) -> int:
    """Bytes of `measuring_room`."""
    return 4 * (2 * tokens + (group + HEADS - 1) * (SUMS * LANES + value_dim) + 2 * HEADS * LONGEST)


@kernel
def pick_drawn(indices, log_weights, at, length, drawn, added):
    """The entries of a list, from `at` on, that were drawn: their tokens, and log weights; returns
    how many."""
    count = 0
    for i in range(at, at + length):
        drawn[count], added[count] = indices[i], log_weights[i]
        count += log_weights[i] > 0
    return count


@kernel
def sum_of(vector, room):
    """The sum of a vector's lanes, in float64. room: for eight numbers."""
    store(room, 0, vector)
    total = np.float64(0)
    for lane in range(LANES):
        total += np.float64(room[lane])
    return total


@kernel
def length_of(static, values, row, room):
    """|v|^2 of one row. room: for eight numbers."""
    total = splat(np.float32(0))
    for d in range(0, static.value_dim, LANES):
        v = load_state(values, row, d)
        total = fma(v, v, total)
    return np.float32(sum_of(total, room))


@kernel
def weigh_block(static, work, state, chances, lengths, totals):
    """Turn a block's logits into c, relative to the softmax's top, and add them up in totals."""
    top = load(work, state)
    for i in range(0, static.heads * static.block, LANES):
        weight = exp(subtract(load(work, i), top))
        c = multiply(multiply(weight, weight), load(chances, i))
        store(work, i, c)
        store(totals, 0, add(load(totals, 0), c))
        store(totals, LANES, fma(c, load(lengths, i), load(totals, LANES)))
        store(totals, 2 * LANES, add(load(totals, 2 * LANES), weight))


@kernel
def measure_sample(static, call, work, indices, log_weights, at, length, keys, key, values, value,
                   softcap, scratch, room):  # fmt: skip
    """Sums over the tokens drawn, for `bar_and_drawn`, after attention to a list. room: as of
    `measuring_room`."""
    drawn, added, totals, sums, chances, lengths = room
    passes, q, state, o = workspace(static, call)
    heads, lanes = static.heads, static.heads * static.block
    for i in range(0, passes * SUMS * LANES, LANES):
        store(totals, i, splat(np.float32(0)))
    for i in range(0, passes * heads * static.value_dim, LANES):
        store(sums, i, splat(np.float32(0)))
    seen = splat(np.float32(0))
    count = pick_drawn(indices, log_weights, at, length, drawn, added)
    for first in range(0, count, static.block):
        find_rows(static, call, drawn, 0, first, count, key, value, scratch, KEYS, VALUES)
        valid = min(static.block, count - first)
        for token in range(valid):
            unlikely = np.float32(-math.expm1(-added[first + token]))
            size = length_of(static, values, scratch[VALUES + token], work)
            for i in range(heads * token, heads * (token + 1)):
                chances[i], lengths[i] = unlikely, size
        for i in range(heads * valid, lanes):
            chances[i] = lengths[i] = np.float32(0)
        for number in range(passes):
            queries = q + number * heads * static.dim
            out = number * heads * static.value_dim
            if heads == 4:
                seen = logits_of_four(static, work, queries, keys, scratch, KEYS, work, seen)
            else:
                seen = logits_of_one(static, work, queries, keys, scratch, KEYS, work, seen)
            if softcap > 0:
                for i in range(0, lanes, LANES):
                    cap(work, i, softcap)
            for i in range(heads * valid):
                work[i] += added[first + i // heads]
            for i in range(heads * valid, lanes):
                work[i] = -np.inf
            weigh_block(static, work, state + 16 * number, chances, lengths,
                        totals[SUMS * LANES * number :])  # fmt: skip
            if heads == 4:
                seen = add_values_of_four(static, work, values, scratch, VALUES, sums, out, seen)
            else:
                seen = add_values_of_one(static, work, values, scratch, VALUES, sums, out, seen)
    store(work, 0, seen)
    for number in range(passes):
        at = SUMS * LANES * number
        store(totals, at + 3 * LANES, load(work, state + 16 * number + 8))
        for i in range(at, at + SUMS * LANES, LANES):
            store(totals, i, total_of(static, load(totals, i)))


@kernel
def bar_and_drawn(static, call, work, member, room):
    """Logarithms of two statistics of a unit's head: the error bar / |o|, and the part of the
    weight that drawn tokens have. room: after `measure_sample`."""
    _, _, totals, sums, _, _ = room
    _, _, _, o = workspace(static, call)
    at, source = member * static.value_dim, o + member * static.value_dim
    ways = lengths = splat(np.float32(0))
    for d in range(0, static.value_dim, LANES):
        out = load(work, source + d)
        ways, lengths = fma(out, load(sums, at + d), ways), fma(out, out, lengths)
    of = SUMS * LANES * (member // static.heads) + member % static.heads
    c, squares = np.float64(totals[of]), np.float64(totals[of + LANES])
    weight, total = np.float64(totals[of + 2 * LANES]), np.float64(totals[of + 3 * LANES])
    way, length = sum_of(ways, work), sum_of(lengths, work)
    variance = squares - 2 * way / total + length / total / total * c
    variance = np.float64(0) if variance < 0 else variance  # but NaN stays
    return math.log(variance / length) / 2, math.log(weight / total)

"""How far a list that was drawn may be from dense attention, by its own sample.

As hashattn.attention.error_bars has it: with a token's weight w and the probability p that it was
drawn with, the variance is sum c |v - o|^2 of c = (1 - p) w^2, which is sum c |v|^2 - 2 o sum c v +
|o|^2 sum c. These sums are made block by block while attention has the rows in the caches, relative
to the top of its softmax like its own.
"""

import math

import numpy as np

from .simd import (
    LANES,
    above,
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
    sums,
)
from .static import LONGEST

HEADS = 4  # of a pass, at most
SUMS = 4  # over tokens drawn of c, of c |v|^2 and of w, and over all of w


@kernel
def sample_room(memory, group, value_dim):
    """A thread's arrays for a list that is drawn: SUMS vectors of each pass, sum c v of each head,
    1 - p and |v|^2 of a block's tokens, for every head, and room for a block."""
    passes = group + HEADS - 1
    totals = at_address(memory, passes * SUMS * LANES, np.float32)
    memory += 4 * passes * SUMS * LANES
    vectors = at_address(memory, passes * value_dim, np.float32)
    memory += 4 * passes * value_dim
    unlikely = at_address(memory, HEADS * LONGEST, np.float32)
    lengths = at_address(memory + 4 * HEADS * LONGEST, HEADS * LONGEST, np.float32)
    return totals, vectors, unlikely, lengths, at_address(memory + 8 * HEADS * LONGEST, LONGEST,
                                                          np.float32)  # fmt: skip


def sample_bytes(group: int, value_dim: int) -> int:
    """Bytes of `sample_room`."""
    return 4 * ((group + HEADS - 1) * (SUMS * LANES + value_dim) + (2 * HEADS + 1) * LONGEST)


@kernel
def begin_sample(static, passes, room):
    """Reset the sums."""
    totals, vectors, _, _, _ = room
    for i in range(0, passes * SUMS * LANES, LANES):
        store(totals, i, splat(np.float32(0)))
    for i in range(0, passes * static.heads * static.value_dim, LANES):
        store(vectors, i, splat(np.float32(0)))


@kernel
def look_at_block(static, values, scratch, rows, log_weights, at, valid, room):
    """1 - p and |v|^2 of a block's tokens, whose log weights begin at `at`, and rows in scratch."""
    _, _, unlikely, lengths, here = room
    heads, zero, one = static.heads, splat(np.float32(0)), splat(np.float32(1))
    for token in range(static.block):
        here[token] = log_weights[at + token] if token < valid else np.float32(0)
    for token in range(0, static.block, LANES):
        chance = subtract(one, exp(subtract(zero, load(here, token))))
        store(here, token, chance)
    for token in range(static.block):
        for i in range(heads * token, heads * (token + 1)):
            unlikely[i] = here[token]
    for token in range(0, static.block, LANES):
        k = rows + token
        r0, r1, r2, r3 = scratch[k], scratch[k + 1], scratch[k + 2], scratch[k + 3]
        r4, r5, r6, r7 = scratch[k + 4], scratch[k + 5], scratch[k + 6], scratch[k + 7]
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = zero
        for d in range(0, static.value_dim, LANES):
            v0, v1 = load_state(values, r0, d), load_state(values, r1, d)
            v2, v3 = load_state(values, r2, d), load_state(values, r3, d)
            v4, v5 = load_state(values, r4, d), load_state(values, r5, d)
            v6, v7 = load_state(values, r6, d), load_state(values, r7, d)
            a0, a1, a2, a3 = fma(v0, v0, a0), fma(v1, v1, a1), fma(v2, v2, a2), fma(v3, v3, a3)
            a4, a5, a6, a7 = fma(v4, v4, a4), fma(v5, v5, a5), fma(v6, v6, a6), fma(v7, v7, a7)
        store(here, token, sums(a0, a1, a2, a3, a4, a5, a6, a7))
    for token in range(static.block):
        for i in range(heads * token, heads * (token + 1)):
            lengths[i] = here[token]


@kernel
def add_block(static, work, number, before, top, room):
    """Turn the weights of a pass over a block into c, and add them to the pass's sums but for those
    of values, which are only made relative to the new top. before: the top so far, as `top` has
    the lanes of its heads."""
    totals, vectors, unlikely, lengths, here = room
    totals = totals[SUMS * LANES * number :]
    shrink = exp(subtract(before, top))
    square = multiply(shrink, shrink)
    c_sum, squares = multiply(load(totals, 0), square), multiply(load(totals, LANES), square)
    weights = multiply(load(totals, 2 * LANES), shrink)
    for i in range(0, static.heads * static.block, LANES):
        weight, chance = load(work, i), load(unlikely, i)
        c = multiply(multiply(weight, weight), chance)
        store(work, i, c)
        c_sum, squares = add(c_sum, c), fma(c, load(lengths, i), squares)
        weights = fma(weight, above(chance, splat(np.float32(0))), weights)
    store(totals, 0, c_sum)
    store(totals, LANES, squares)
    store(totals, 2 * LANES, weights)
    store(here, 0, square)
    for head in range(static.heads):
        if here[head] != np.float32(1):
            factor, at = splat(here[head]), (static.heads * number + head) * static.value_dim
            for d in range(at, at + static.value_dim, LANES):
                store(vectors, d, multiply(load(vectors, d), factor))


@kernel
def sum_of(vector, room):
    """The sum of a vector's lanes, in float64. room: for eight numbers."""
    store(room, 0, vector)
    total = np.float64(0)
    for lane in range(LANES):
        total += np.float64(room[lane])
    return total


@kernel
def bar_and_drawn(static, member, out, o, room):
    """Logarithms of two statistics of a unit's head, whose output times its total begins at out[o]:
    the error bar / |o|, and the part of the weight that drawn tokens have. The totals are summed
    over the lanes of a head."""
    totals, vectors, _, _, here = room
    at, source = member * static.value_dim, o + member * static.value_dim
    ways = lengths = splat(np.float32(0))
    for d in range(0, static.value_dim, LANES):
        row = load(out, source + d)
        ways, lengths = fma(row, load(vectors, at + d), ways), fma(row, row, lengths)
    of = SUMS * LANES * (member // static.heads) + member % static.heads
    c, squares = np.float64(totals[of]), np.float64(totals[of + LANES])
    weight, total = np.float64(totals[of + 2 * LANES]), np.float64(totals[of + 3 * LANES])
    way, length = sum_of(ways, here), sum_of(lengths, here)
    variance = squares - 2 * way / total + length / total / total * c
    variance = np.float64(0) if variance < 0 else variance  # but NaN stays
    return math.log(variance / length) / 2, math.log(weight / total)

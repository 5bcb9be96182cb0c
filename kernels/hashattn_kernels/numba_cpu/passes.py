"""Passes over one block of tokens: logits from K rows, sums over V rows.

A pass takes four query heads, so that a row of K or V is converted once for all of them, or a
single one. It keeps eight sums in vector registers, which every processor has. While it computes,
it prefetches the rows of a later block (`simd.prefetch`), at the pace at which it consumes rows.

In all passes: `seen` folds in what prefetching reads, so that the reads are not optimised away.
"""

import numpy as np

from .simd import (
    add,
    fma,
    kernel,
    load,
    load_state,
    multiply,
    prefetch,
    scale_at,
    splat,
    store,
    sums,
)
from .static import LONGEST

STEP = 16  # elements of a row between two requests for later ones

# parts of a thread's int64 scratch: rows of this block and the next, and those to prefetch
KEYS, VALUES, NEXT_KEYS, NEXT_VALUES, LATER_KEYS, LATER_VALUES = (LONGEST * i for i in range(6))
SCRATCH = LONGEST * 6


@kernel
def logits_of_four(static, queries, q, keys, scratch, later, logits, seen):
    """logits[4 * token + head] of a block: four heads against two tokens at a time."""
    dim = static.dim
    for token in range(0, static.block, 2):
        first, second = scratch[KEYS + token], scratch[KEYS + token + 1]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
        piece, position = later + token, 0
        for start in range(0, dim, STEP):
            seen = prefetch(static, keys, scratch[piece], position, seen)
            position += 2 * STEP
            if position >= dim:
                piece, position = piece + 1, position - dim
            for d in (start, start + 8):
                x, y = load_state(keys, first, d), load_state(keys, second, d)
                head = load(queries, q + d)
                a0, b0 = fma(head, x, a0), fma(head, y, b0)
                head = load(queries, q + dim + d)
                a1, b1 = fma(head, x, a1), fma(head, y, b1)
                head = load(queries, q + 2 * dim + d)
                a2, b2 = fma(head, x, a2), fma(head, y, b2)
                head = load(queries, q + 3 * dim + d)
                a3, b3 = fma(head, x, a3), fma(head, y, b3)
        store(logits, 4 * token, sums(a0, a1, a2, a3, b0, b1, b2, b3))
    return seen


@kernel
def logits_of_one(static, queries, q, keys, scratch, later, logits, seen):
    """logits[token] of a block: one head against eight tokens at a time."""
    dim = static.dim
    for token in range(0, static.block, 8):
        at = KEYS + token
        r0, r1, r2, r3 = scratch[at], scratch[at + 1], scratch[at + 2], scratch[at + 3]
        r4, r5, r6, r7 = scratch[at + 4], scratch[at + 5], scratch[at + 6], scratch[at + 7]
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(np.float32(0))
        piece, position = later + token, 0
        for start in range(0, dim, STEP):
            for _ in range(4):
                seen = prefetch(static, keys, scratch[piece], position, seen)
                position += 2 * STEP
                if position >= dim:
                    piece, position = piece + 1, position - dim
            for d in (start, start + 8):
                head = load(queries, q + d)
                a0, a1 = (
                    fma(head, load_state(keys, r0, d), a0),
                    fma(head, load_state(keys, r1, d), a1),
                )
                a2, a3 = (
                    fma(head, load_state(keys, r2, d), a2),
                    fma(head, load_state(keys, r3, d), a3),
                )
                a4, a5 = (
                    fma(head, load_state(keys, r4, d), a4),
                    fma(head, load_state(keys, r5, d), a5),
                )
                a6, a7 = (
                    fma(head, load_state(keys, r6, d), a6),
                    fma(head, load_state(keys, r7, d), a7),
                )
        store(logits, token, sums(a0, a1, a2, a3, a4, a5, a6, a7))
    return seen


@kernel
def add_values_of_four(static, weights, values, scratch, later, out, o, seen):
    """out[head] += weight * value over a block, four tokens at a time for four heads."""
    dim = static.value_dim
    for token in range(0, static.block, 4):
        at, w = VALUES + token, 4 * token
        r0, r1, r2, r3 = scratch[at], scratch[at + 1], scratch[at + 2], scratch[at + 3]
        a0, b0 = splat(weights[w]), splat(weights[w + 1])
        c0, d0 = splat(weights[w + 2]), splat(weights[w + 3])
        a1, b1 = splat(weights[w + 4]), splat(weights[w + 5])
        c1, d1 = splat(weights[w + 6]), splat(weights[w + 7])
        a2, b2 = splat(weights[w + 8]), splat(weights[w + 9])
        c2, d2 = splat(weights[w + 10]), splat(weights[w + 11])
        a3, b3 = splat(weights[w + 12]), splat(weights[w + 13])
        c3, d3 = splat(weights[w + 14]), splat(weights[w + 15])
        piece, position = later + token, 0
        for start in range(0, dim, STEP):
            for _ in range(2):
                seen = prefetch(static, values, scratch[piece], position, seen)
                position += 2 * STEP
                if position >= dim:
                    piece, position = piece + 1, position - dim
            for d in (start, start + 8):
                v0, v1 = load_state(values, r0, d), load_state(values, r1, d)
                v2, v3 = load_state(values, r2, d), load_state(values, r3, d)
                at = o + d
                total = fma(a1, v1, fma(a0, v0, load(out, at)))
                store(out, at, fma(a3, v3, fma(a2, v2, total)))
                at += dim
                total = fma(b1, v1, fma(b0, v0, load(out, at)))
                store(out, at, fma(b3, v3, fma(b2, v2, total)))
                at += dim
                total = fma(c1, v1, fma(c0, v0, load(out, at)))
                store(out, at, fma(c3, v3, fma(c2, v2, total)))
                at += dim
                total = fma(d1, v1, fma(d0, v0, load(out, at)))
                store(out, at, fma(d3, v3, fma(d2, v2, total)))
    return seen


@kernel
def add_values_of_one(static, weights, values, scratch, later, out, o, seen):
    """out += weight * value over a block, eight tokens at a time for one head."""
    dim = static.value_dim
    for token in range(0, static.block, 8):
        at = VALUES + token
        r0, r1, r2, r3 = scratch[at], scratch[at + 1], scratch[at + 2], scratch[at + 3]
        r4, r5, r6, r7 = scratch[at + 4], scratch[at + 5], scratch[at + 6], scratch[at + 7]
        w0, w1 = splat(weights[token]), splat(weights[token + 1])
        w2, w3 = splat(weights[token + 2]), splat(weights[token + 3])
        w4, w5 = splat(weights[token + 4]), splat(weights[token + 5])
        w6, w7 = splat(weights[token + 6]), splat(weights[token + 7])
        piece, position = later + token, 0
        for start in range(0, dim, STEP):
            for _ in range(4):
                seen = prefetch(static, values, scratch[piece], position, seen)
                position += 2 * STEP
                if position >= dim:
                    piece, position = piece + 1, position - dim
            for d in (start, start + 8):
                total = fma(w0, load_state(values, r0, d), load(out, o + d))
                other = multiply(w1, load_state(values, r1, d))
                total = fma(w2, load_state(values, r2, d), total)
                other = fma(w3, load_state(values, r3, d), other)
                total = fma(w4, load_state(values, r4, d), total)
                other = fma(w5, load_state(values, r5, d), other)
                total = fma(w6, load_state(values, r6, d), total)
                other = fma(w7, load_state(values, r7, d), other)
                store(out, o + d, add(total, other))
    return seen


@kernel
def scale_block(static, states, scratch, at, numbers):
    """Multiply numbers[heads * token + head] of a block by the scales `at` bytes behind its K rows:
    logits by those of K, and weights by those of V, so that elements need none."""
    for token in range(static.block):
        scale = scale_at(states, scratch[KEYS + token] + at)
        for head in range(static.heads):
            numbers[static.heads * token + head] *= scale

"""Keys and values to rows of 8 or 4 bits (see ..quantised), one row at a time in the caches."""

from functools import cache

import numpy as np
import torch

from ..quantised import CURVE, MOST, NORMAL, SMALLEST, tables
from .regions import Region, address_of, call_type, report, share_of
from .simd import (
    above,
    add,
    at_address,
    divide,
    fma,
    kernel,
    load,
    multiply,
    splat,
    states_at,
    store,
)
from .static import STORAGE, static_of

SPREADS, EDGES = (table.flatten().numpy() for table in tables(torch.device("cpu")))
TABLES_AT = SPREADS.ctypes.data, EDGES.ctypes.data
TRIED, BETWEEN = len(SPREADS), len(EDGES)
HALVED = np.float32((1 + 2**-8) / MOST)

# a call of quantise_share
CALL = call_type(
    "heads", "tokens", "bits",
    "k", "k_size", "k_batch", "k_head", "k_token", "key_signs",
    "v", "v_size", "v_batch", "v_head", "v_token", "value_signs",
    "rows", "width", "spreads", "edges", "memory", "memory_size",
)  # fmt: skip


def memory_of(dim: int) -> int:
    """Bytes of a thread's memory: a vector in float64 and in float32, the codes of every scale that
    is tried as float32, and eight numbers of float32 and of bfloat16."""
    return 8 * dim + 4 * dim * (1 + TRIED) + 6 * 8


@kernel
def add_and_subtract(vector, first, size):
    """Multiply vector[first : first + size] by a Hadamard matrix, divided by its root."""
    half = 1
    while half < size:
        for start in range(first, first + size, 2 * half):
            for i in range(start, start + half):
                low, high = vector[i], vector[i + half]
                vector[i], vector[i + half] = low + high, low - high
        half *= 2
    for i in range(first, first + size):
        vector[i] /= np.sqrt(float(size))


@kernel
def turn(vector, dim, signs, wide):
    """quantised.rotation, in place: vector (dim) float32, signs (2 * dim) and wide (dim) float64.
    Returns whether the result holds NaN or infinite numbers."""
    size = 1
    while 2 * size <= dim:
        size *= 2
    for i in range(dim):
        wide[i] = vector[i] * signs[i]
    add_and_subtract(wide, 0, size)
    if size < dim:
        for i in range(dim):
            wide[i] *= signs[dim + i]
        add_and_subtract(wide, dim - size, size)
    flawed = False
    for i in range(dim):
        vector[i] = np.float32(wide[i])
        flawed |= not np.isfinite(vector[i])
    return flawed


@kernel
def largest_of(vector, dim):
    largest = np.float32(0)
    for i in range(dim):
        largest = max(largest, abs(vector[i]))
    return largest


@kernel
def total(eight, lanes):
    store(eight, 0, lanes)
    found = np.float32(0)
    for lane in range(8):
        found += eight[lane]
    return found


@kernel
def put_scale(scale, rows, at, eight, rounded):
    """Store a scale, rounded to bfloat16; returns what it is then."""
    store(rounded, 0, splat(scale))
    rows[at] = np.uint8(rounded[0] & np.uint16(255))
    rows[at + 1] = np.uint8(rounded[0] >> np.uint16(8))
    store(eight, 0, load(rounded, 0))
    return eight[0]


@kernel
def put_bytes(vector, dim, rows, at, scale_at, eight, rounded):
    scale = put_scale(largest_of(vector, dim) * HALVED, rows, scale_at, eight, rounded)
    scale = max(scale, np.float32(SMALLEST))
    for i in range(dim):
        code = min(max(np.rint(vector[i] / scale), np.float32(-MOST)), np.float32(MOST))
        rows[at + i] = np.uint8(np.int32(code) & np.int32(255))


@kernel
def put_halves(vector, dim, rows, at, scale_at, spreads, edges, codes, eight, rounded):
    """The levels nearest for the best of some scales, as quantised has it."""
    largest, zero = largest_of(vector, dim), splat(np.float32(0))
    divisor, squares = splat(max(largest, np.float32(SMALLEST))), zero
    for d in range(0, dim, 8):
        part = divide(load(vector, d), divisor)
        store(vector, d, part)
        squares = fma(part, part, squares)
    deviation = np.sqrt(total(eight, squares) / np.float32(dim))
    deviation = max(deviation, np.float32(SMALLEST)) / np.float32(NORMAL)
    best, most, multiple = 0, np.float32(-1), np.float32(0)
    for tried in range(TRIED):
        divisor, products, squares = splat(deviation * spreads[tried]), zero, zero
        for d in range(0, dim, 8):
            part, code = load(vector, d), zero
            number = divide(part, divisor)
            for edge in range(BETWEEN):
                code = add(code, above(number, splat(edges[edge])))
            store(codes, tried * dim + d, code)
            x = fma(code, splat(np.float32(1 / 8)), splat(np.float32(-15 / 16)))
            level = multiply(x, fma(x, x, splat(np.float32(CURVE))))
            products, squares = fma(level, part, products), fma(level, level, squares)
        product, size = total(eight, products), total(eight, squares)
        if product * product / size > most:
            best, most, multiple = tried, product * product / size, product / size
    put_scale(largest * multiple, rows, scale_at, eight, rounded)
    for i in range(0, dim, 16):
        for j in range(8):
            low, high = codes[best * dim + i + j], codes[best * dim + i + 8 + j]
            rows[at + i // 2 + j] = np.uint8(np.int32(low) + np.int32(16) * np.int32(high))


@kernel
def put_vector(states, source, dim, signs, call, spreads, edges, rows, at, scale_at, memory):
    """Quantise states[source : source + dim]; returns 1 if it is not finite once rotated."""
    wide = at_address(memory, dim, np.float64)
    vector = at_address(memory + 8 * dim, dim, np.float32)
    codes = at_address(memory + 12 * dim, TRIED * dim, np.float32)
    eight = at_address(memory + (12 + 4 * TRIED) * dim, 8, np.float32)
    rounded = at_address(memory + (12 + 4 * TRIED) * dim + 32, 8, np.uint16)
    for d in range(0, dim, 8):
        store(vector, d, load(states, source + d))
    if turn(vector, dim, signs, wide):
        return 1
    if call.bits == 8:
        put_bytes(vector, dim, rows, at, scale_at, eight, rounded)
    else:
        put_halves(vector, dim, rows, at, scale_at, spreads, edges, codes, eight, rounded)
    return 0


@kernel
def quantise_share(static, data):
    """Rows of this thread's units: (batch, head, token), the last fastest.

    data: the address of a CALL. Reports how many vectors hold NaN or infinite numbers.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    number, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    dim, value_dim, width = static.dim, static.value_dim, call.width
    keys = states_at(static, call.k, call.k_size)
    values = states_at(static, call.v, call.v_size)
    key_signs = at_address(call.key_signs, 2 * dim, np.float64)
    value_signs = at_address(call.value_signs, 2 * value_dim, np.float64)
    spreads = at_address(call.spreads, TRIED, np.float32)
    edges = at_address(call.edges, BETWEEN, np.float32)
    rows = at_address(call.rows, call.units * width, np.uint8)
    memory = call.memory + number * call.memory_size
    flaws = 0
    for unit in range(start, stop):
        token, head = unit % call.tokens, unit // call.tokens % call.heads
        batch, at = unit // (call.tokens * call.heads), unit * width
        scales = at + width - 4
        source = batch * call.k_batch + head * call.k_head + token * call.k_token
        flaws += put_vector(keys, source, dim, key_signs, call, spreads, edges, rows, at, scales,
                            memory)  # fmt: skip
        source = batch * call.v_batch + head * call.v_head + token * call.v_token
        flaws += put_vector(values, source, value_dim, value_signs, call, spreads, edges, rows,
                            at + dim * call.bits // 8, scales + 2, memory)  # fmt: skip
    report(call.results, call.threads, number, flaws)


@cache
def quantise_region(dim: int, value_dim: int, states: torch.dtype) -> Region:
    """The compiled region of these head dims and this dtype of keys and values."""
    state_type = STORAGE[states]

    def body(data):
        static = static_of(dim, value_dim, 8, 1, 0, state_type, np.float32)
        quantise_share(static, data)

    return Region(body)

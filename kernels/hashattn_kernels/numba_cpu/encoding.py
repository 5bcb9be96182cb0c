"""Codes of a few vectors: every stage of a map, the signs and the packing in one pass.

Reading the maps' weights is what a token's code costs, so they are packed in strips of 32 outputs
that are read once, in bfloat16 where that loses nothing.
"""

import math
from functools import cache

import numpy as np
import torch

from .regions import Region, address_of, call_type, report, share_of
from .selection import WORD, grade, store_grades
from .simd import (
    add,
    at_address,
    divide,
    exp,
    fma,
    kernel,
    larger,
    load,
    positive,
    splat,
    store,
    subtract,
)
from .static import STORAGE

STRIP = 32  # outputs accumulated together: four vectors
SILU, RELU, GELU, TANH = range(4)

_STACK = ("maps", "heads", "rows", "x", "x_size", "x_batch", "x_head", "x_row", "weights", "biases",
          "out")  # fmt: skip
CALL = call_type(
    "stages", "widths", "activation", "folds", "map_weights", "map_biases", "batch",
    "memory", "memory_size",
    *_STACK, *(f"{name}_2" for name in _STACK),
)  # fmt: skip
PACK_CALL = call_type("words", "x", "out")
GRADE_CALL = call_type(
    "stages", "widths", "activation", "folds", "map_weights", "map_biases", "batch", "lists",
    "group", "rows", "grades", "most", "widest", "x", "x_size", "x_batch", "x_head", "x_row",
    "weights", "biases", "out", "steps", "memory", "memory_size",
)  # fmt: skip


@kernel
def stage(weights, at, biases, bias_at, inputs, outputs, x, y):
    """y = x W + b for W in strips (outputs / 32, inputs, 32); returns where W and b end.

    The last strip may have more columns than there are outputs. What they leave in y is not read:
    zeros in W times an infinite x are NaN.
    """
    for out in range(0, outputs, STRIP):
        a0, a1 = load(biases, bias_at + out), load(biases, bias_at + out + 8)
        a2, a3 = load(biases, bias_at + out + 16), load(biases, bias_at + out + 24)
        for i in range(inputs):
            factor = splat(x[i])
            a0 = fma(factor, load(weights, at), a0)
            a1 = fma(factor, load(weights, at + 8), a1)
            a2 = fma(factor, load(weights, at + 16), a2)
            a3 = fma(factor, load(weights, at + 24), a3)
            at += STRIP
        store(y, out, a0)
        store(y, out + 8, a1)
        store(y, out + 16, a2)
        store(y, out + 24, a3)
    return at, bias_at + (outputs + STRIP - 1) // STRIP * STRIP


@kernel
def activate(x, size, activation):
    """x = activation(x), in place; silu as x / (1 + e^-x)."""
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    if activation == SILU:
        for i in range(0, size, 8):
            value = load(x, i)
            store(x, i, divide(value, add(one, exp(subtract(zero, value)))))
    elif activation == RELU:
        for i in range(0, size, 8):
            store(x, i, larger(zero, load(x, i)))
    elif activation == GELU:
        for i in range(size):
            x[i] *= np.float32(0.5 * (1 + math.erf(x[i] * math.sqrt(0.5))))
    else:
        for i in range(size):
            x[i] = np.float32(math.tanh(x[i]))


@kernel
def fold(x, size, steps, at):
    """x = x - sign(x) step, in place; the sign of what is not positive is -1."""
    for i in range(size):
        step = steps[at + i]
        x[i] -= step if x[i] > 0 else -step


@kernel
def pack(x, words, out, at):
    """Pack the signs of x (bit = x > 0) into words, out[at:]."""
    for word in range(words):
        code = np.uint32(0)
        for byte in range(4):
            code |= positive(load(x, WORD * word + 8 * byte)) << np.uint32(8 * byte)
        out[at + word] = code


@kernel
def encode_share(data, x_type, weight_type):
    """Encode this thread's units, each one map of a stack with all rows of a batch item.

    data: the address of a CALL. Its one or two stacks have the same stages. Codes (batch, maps,
    rows, words) uint32; map m reads head m // (maps / heads). Weights and biases: map after map, in
    strips of 32 outputs, the steps of the folds after a map's biases; widths: sizes of the input
    and of every stage's output.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    widths = at_address(call.widths, call.stages + 1, np.int64)
    memory = call.memory + thread * call.memory_size
    widest = call.memory_size // 8
    x_buffer = at_address(memory, widest, np.float32)
    y_buffer = at_address(memory + 4 * widest, widest, np.float32)
    first = call.batch * call.maps
    for unit in range(start, stop):
        if unit < first:
            encode_vectors(
                call, widths, unit // call.batch, unit % call.batch, call.maps, call.heads,
                call.rows, call.x, call.x_size, call.x_batch, call.x_head, call.x_row,
                call.weights, call.biases, call.out, x_buffer, y_buffer, x_type, weight_type,
            )  # fmt: skip
        else:
            unit -= first
            encode_vectors(
                call, widths, unit // call.batch, unit % call.batch, call.maps_2, call.heads_2,
                call.rows_2, call.x_2, call.x_size_2, call.x_batch_2, call.x_head_2, call.x_row_2,
                call.weights_2, call.biases_2, call.out_2, x_buffer, y_buffer, x_type, weight_type,
            )  # fmt: skip
    report(call.results, call.threads, thread, 0)


@kernel
def run_map(x, at, inputs, stages, widths, activation, folds, weights, weight_at, biases, bias_at,
            here, there):  # fmt: skip
    """Pre-activations of the vector x[at:] by the map whose parameters begin at weight_at and
    bias_at, in `here`. `there`: room for a stage's output."""
    if stages % 2:  # every stage swaps the two
        here, there = there, here
    for i in range(0, inputs, 8):
        store(here, i, load(x, at + i))
    for depth in range(stages):
        if depth:
            activate(here, widths[depth], activation)
        weight_at, bias_at = stage(
            weights, weight_at, biases, bias_at, widths[depth], widths[depth + 1], here, there
        )
        here, there = there, here
    for _ in range(folds):
        fold(here, widths[stages], biases, bias_at)
        bias_at += widths[stages]


@kernel
def encode_vectors(call, widths, number, item, maps, heads, rows, x_at, x_size, x_batch, x_head,
                   x_row, weights_at, biases_at, out_at, x_buffer, y_buffer, x_type,
                   weight_type):  # fmt: skip
    """Codes of all rows of a batch item by one map; the buffers hold a stage's input and output."""
    words = widths[call.stages] // WORD
    x = at_address(x_at, x_size, x_type)
    weights = at_address(weights_at, maps * call.map_weights, weight_type)
    biases = at_address(biases_at, maps * call.map_biases, np.float32)
    out = at_address(out_at, call.batch * maps * rows * words, np.uint32)
    for row in range(rows):
        source = item * x_batch + number // (maps // heads) * x_head + row * x_row
        run_map(
            x, source, widths[0], call.stages, widths, call.activation, call.folds, weights,
            number * call.map_weights, biases, number * call.map_biases, x_buffer, y_buffer,
        )  # fmt: skip
        pack(x_buffer, words, out, ((item * maps + number) * rows + row) * words)


@kernel
def sum_group(call, widths, x, at, head, x_head, weights, biases, here, there, sums):
    """sums[:bits]: pre-activations of `call.group` heads from `head` on, of the vectors at
    x[at + h * x_head :], added up in their order."""
    bits = widths[call.stages]
    for member in range(call.group):
        number = head + member
        run_map(
            x, at + member * x_head, widths[0], call.stages, widths, call.activation, call.folds,
            weights, number * call.map_weights, biases, number * call.map_biases, here, there,
        )  # fmt: skip
        for bit in range(0, bits, 8):
            value = load(here, bit)
            store(sums, bit, add(load(sums, bit), value) if member else value)


@kernel
def grade_share(data, x_type, weight_type):
    """Graded codes of this thread's units, (batch, list, row), the last fastest.

    data: the address of a GRADE_CALL, whose map is as of encode_share. out (batch, lists, rows,
    words, 1 + grades) uint32, steps (batch, lists, rows) float32.
    """
    call = at_address(address_of(data), 1, GRADE_CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    widths = at_address(call.widths, call.stages + 1, np.int64)
    rows, lists, heads = call.rows, call.lists, call.lists * call.group
    x = at_address(call.x, call.x_size, x_type)
    weights = at_address(call.weights, heads * call.map_weights, weight_type)
    biases = at_address(call.biases, heads * call.map_biases, np.float32)
    bits, count = widths[call.stages], call.batch * lists * rows
    size = bits // WORD * (1 + call.grades)
    out = at_address(call.out, count * size, np.uint32)
    steps = at_address(call.steps, count, np.float32)
    memory = call.memory + thread * call.memory_size
    here, there, sums, shares, signs, digits = grading_room(memory, call.widest, bits)
    for unit in range(start, stop):
        row, line, item = unit % rows, unit // rows % lists, unit // (rows * lists)
        head = line * call.group
        at = item * call.x_batch + head * call.x_head + row * call.x_row
        sum_group(call, widths, x, at, head, call.x_head, weights, biases, here, there, sums)
        steps[unit] = grade(sums, bits, call.grades, call.most, shares, signs, digits)
        store_grades(signs, digits, bits // WORD, call.grades, out, unit * size)
    report(call.results, call.threads, thread, 0)


@kernel
def grading_room(memory, widest, bits):
    """A thread's arrays: two buffers of a stage, sums, shares, signs and weights of a query."""
    shares = at_address(memory, bits, np.float64)
    memory += 8 * bits
    here = at_address(memory, widest, np.float32)
    there = at_address(memory + 4 * widest, widest, np.float32)
    memory += 8 * widest
    sums = at_address(memory, bits, np.float32)
    memory += 4 * bits
    signs = at_address(memory, bits // WORD, np.uint32)
    weights = at_address(memory + 4 * (bits // WORD), bits, np.uint16)
    return here, there, sums, shares, signs, weights


def grading_bytes(widest: int, bits: int) -> int:
    """Bytes of `grading_room`, rounded up to whole lines of 64."""
    size = 8 * bits + 8 * widest + 4 * bits + bits // 8 + 2 * bits
    return -(-size // 64) * 64


@kernel
def pack_share(data):
    """Codes of this thread's rows of pre-activations, contiguous float32."""
    call = at_address(address_of(data), 1, PACK_CALL)[0]
    thread, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    bits = WORD * call.words
    x = at_address(call.x, call.units * bits, np.float32)
    out = at_address(call.out, call.units * call.words, np.uint32)
    for row in range(start, stop):
        pack(x[row * bits : (row + 1) * bits], call.words, out, row * call.words)
    report(call.results, call.threads, thread, 0)


@cache
def encode_region(x_dtype: torch.dtype, half: bool) -> Region:
    """The compiled region for vectors of a dtype; half: weights in bfloat16, else float32."""
    x_type, weight_type = STORAGE[x_dtype], np.uint16 if half else np.float32

    def body(data):
        encode_share(data, x_type, weight_type)

    return Region(body)


@cache
def grade_region(x_dtype: torch.dtype, half: bool) -> Region:
    """The compiled region that grades vectors of a dtype; half: weights in bfloat16."""
    x_type, weight_type = STORAGE[x_dtype], np.uint16 if half else np.float32

    def body(data):
        grade_share(data, x_type, weight_type)

    return Region(body)


@cache
def pack_region() -> Region:
    """The compiled region that packs signs."""

    def body(data):
        pack_share(data)

    return Region(body)

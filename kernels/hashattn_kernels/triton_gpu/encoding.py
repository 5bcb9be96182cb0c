"""Small networks, signs and packing in one launch, for the queries and new keys of a step."""

import triton
import triton.language as tl

from .attention import product
from .scoring import COLUMNS, LANES


@triton.jit
def times(x, weight, SHORT: tl.constexpr):
    """x (rows, in) float32 times weights (in, out), nearly as exact as float32.

    For bfloat16 weights x is split into two bfloat16 numbers, which keep 16 bits of x, where one
    would keep 8, and have exact products. SHORT: x is bfloat16 already. Other weights take three
    TF32 products.
    """
    if SHORT and weight.dtype == tl.bfloat16:
        return product(x.to(tl.bfloat16), weight)
    elif weight.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        low = tl.where(high.to(tl.float32) == x, 0.0, rest).to(tl.bfloat16)  # inf - inf is NaN
        return product(high, weight) + product(low, weight)
    else:
        return tl.dot(x, weight, input_precision="tf32x3")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, relu, gelu (exact) or tanh."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # a maximum would drop NaN
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def encode_kernel(
    X, X2, WEIGHTS, BIASES, OUT, OUT2, SPANS,
    x_batch, x_head, x_row, x2_batch, x2_head, x2_row, out2_batch, out2_head,
    maps, stored, share, share2, rows, rows2,
    IN: tl.constexpr, IN_SLOTS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    BITS: tl.constexpr, BIT_SLOTS: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr,
    FOLDS: tl.constexpr, BLOCK: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCK vectors of one head. Grid (blocks of rows, maps of both stacks, batch).

    The first `maps` programs of axis 1 read X (batch, heads, rows, IN), with `share` maps a head,
    and write OUT (batch, maps, rows, words) int32; the others read X2 and write OUT2 likewise, or,
    if TILED, the code of one vector into the tiles of a code cache, at the last token that SPANS
    (batch, 1, 2) sees.
    WEIGHTS, BIASES: of `stored` maps, those of both stacks or of the only one, stage after stage,
    padded to the widths of the slots; a map's biases end with the steps of its FOLDS.
    WIDTHS: of the hidden stages; outputs past them are set to 0, as an infinite x times the
    padding's zeros is NaN.
    """
    block = tl.program_id(0)
    index = tl.program_id(1)
    batch = tl.program_id(2)
    row = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, IN_SLOTS)
    if index < maps:
        x = X + batch.to(tl.int64) * x_batch + (index // share).to(tl.int64) * x_head
        x += row[:, None].to(tl.int64) * x_row + column[None, :]
        here = row < rows
    else:
        x = X2 + batch.to(tl.int64) * x2_batch + ((index - maps) // share2).to(tl.int64) * x2_head
        x += row[:, None].to(tl.int64) * x2_row + column[None, :]
        here = row < rows2
    x = tl.load(x, mask=here[:, None] & (column < IN)[None, :], other=0.0).to(tl.float32)
    GIVEN: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    hidden = tl.arange(0, HIDDEN)
    bit = tl.arange(0, BIT_SLOTS)
    FIRST: tl.constexpr = HIDDEN if DEPTH > 1 else 0
    MIDDLE: tl.constexpr = DEPTH - 2 if DEPTH > 2 else 0
    INNER: tl.constexpr = HIDDEN if DEPTH > 1 else IN_SLOTS
    SIZE: tl.constexpr = IN_SLOTS * FIRST + MIDDLE * HIDDEN * HIDDEN + INNER * BIT_SLOTS
    weight = WEIGHTS + (index % stored).to(tl.int64) * SIZE
    bias = BIASES + index % stored * (FIRST + MIDDLE * HIDDEN + (1 + FOLDS) * BIT_SLOTS)
    if DEPTH > 1:
        x = times(x, tl.load(weight + column[:, None] * HIDDEN + hidden[None, :]), GIVEN)
        x = activate(x + tl.load(bias + hidden)[None, :], ACTIVATION)
        if WIDTHS[0] < HIDDEN:
            x = tl.where((hidden < WIDTHS[0])[None, :], x, 0.0)
        weight += IN_SLOTS * HIDDEN
        bias += HIDDEN
    for stage in tl.static_range(MIDDLE):
        x = times(x, tl.load(weight + hidden[:, None] * HIDDEN + hidden[None, :]), False)
        x = activate(x + tl.load(bias + hidden)[None, :], ACTIVATION)
        if WIDTHS[stage + 1] < HIDDEN:
            x = tl.where((hidden < WIDTHS[stage + 1])[None, :], x, 0.0)
        weight += HIDDEN * HIDDEN
        bias += HIDDEN
    inner = tl.arange(0, INNER)
    LAST_GIVEN: tl.constexpr = GIVEN and DEPTH == 1
    x = times(x, tl.load(weight + inner[:, None] * BIT_SLOTS + bit[None, :]), LAST_GIVEN)
    x += tl.load(bias + bit)[None, :]
    for fold in tl.static_range(FOLDS):
        step = tl.load(bias + (1 + fold) * BIT_SLOTS + bit)[None, :]
        x -= tl.where(x > 0, step, -step)
    ones = (x > 0).to(tl.int32)
    words = tl.sum(tl.reshape(ones << (bit & 31)[None, :], [BLOCK, BIT_SLOTS // 32, 32]), axis=2)
    word = tl.arange(0, BIT_SLOTS // 32)[None, :]
    WORDS: tl.constexpr = BITS // 32
    inside = here[:, None] & (word < WORDS)
    if index < maps:
        at = (batch * maps + index).to(tl.int64) * rows
        tl.store(OUT + (at + row[:, None]) * WORDS + word, words, mask=inside)
    elif TILED:
        token = tl.load(SPANS + 2 * batch + 1) - 1 + row[:, None]
        tile = token // (LANES * COLUMNS) * WORDS + word
        within = token % LANES * COLUMNS + token // LANES % COLUMNS
        at = batch.to(tl.int64) * out2_batch + (index - maps).to(tl.int64) * out2_head
        tl.store(OUT2 + at + tile * (LANES * COLUMNS) + within, words, mask=inside)
    else:
        at = (batch * (tl.num_programs(1) - maps) + index - maps).to(tl.int64) * rows2
        tl.store(OUT2 + (at + row[:, None]) * WORDS + word, words, mask=inside)

"""Small networks, signs, grades and packing in one launch, for a step's queries and new keys."""

import triton
import triton.language as tl

from .. import counters
from ..coins import DEAREST, NAT
from .attention import product
from .scoring import COLUMNS, LANES

# as in reference.grade_bits, whose module these kernels do not depend on
SHARE = tl.constexpr(65_535)
PARTS = tl.constexpr(256)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
HIGHEST = tl.constexpr(3.4028234663852886e38)
ROUNDER = tl.constexpr(8388608.0)  # 2^23: x + ROUNDER - ROUNDER is x rounded, half to even
COSTLIEST = tl.constexpr(float(DEAREST))
CALLS, ROWS = tl.constexpr(counters.CALLS), tl.constexpr(counters.ROWS)
SEEN, LONGEST = tl.constexpr(counters.SEEN), tl.constexpr(counters.LONGEST)
NOT_FINITE, SEVERAL = tl.constexpr(counters.NOT_FINITE), tl.constexpr(counters.SEVERAL)
UNIT = tl.constexpr(2.0 * NAT)  # a bit that differs turns the sign of its weight


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
def preactivations(
    x, weight, bias, IN_SLOTS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    BIT_SLOTS: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, FOLDS: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """x (rows, IN_SLOTS) float32 through one map at these addresses -> (rows, BIT_SLOTS) float32.

    WIDTHS: of the hidden stages; outputs past them are set to 0, as an infinite x times the
    padding's zeros is NaN. GIVEN: x is bfloat16 by nature.
    """
    column = tl.arange(0, IN_SLOTS)
    hidden = tl.arange(0, HIDDEN)
    bit = tl.arange(0, BIT_SLOTS)
    MIDDLE: tl.constexpr = DEPTH - 2 if DEPTH > 2 else 0
    INNER: tl.constexpr = HIDDEN if DEPTH > 1 else IN_SLOTS
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
    return x


@triton.jit
def packed(ones, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Words (ROWS, SLOTS // 32) of the bits `ones` (ROWS, SLOTS) int32."""
    bit = tl.arange(0, SLOTS) & 31
    return tl.sum(tl.reshape(ones << bit[None, :], [ROWS, SLOTS // 32, 32]), axis=2)


@triton.jit
def not_finite(x, axis: tl.constexpr):
    """How many numbers along an axis are NaN or infinite."""
    return tl.sum((~(tl.abs(x) <= HIGHEST)).to(tl.int32), axis=axis)


@triton.jit
def graded(x, BITS: tl.constexpr, PLANES: tl.constexpr, MOST: tl.constexpr):
    """reference.grade_bits and api.grade_step of pre-activations x (rows, slots) float32: weights
    int32 like x, steps (rows) float32. Slots from BITS on must be 0."""
    TOP: tl.constexpr = 2**PLANES - 1
    sizes = tl.abs(x)
    total = tl.sum(sizes, axis=1)
    mean = tl.div_rn(total, MOST - BITS / 2)
    peak = tl.div_rn(tl.max(sizes, axis=1), TOP * 1.0)
    steps = tl.where(peak > mean, peak, mean)  # NaN, which a maximum may drop, is in the mean
    sizes = tl.where(sizes != sizes, 0.0, tl.minimum(sizes, HIGHEST))
    largest = tl.maximum(tl.max(sizes, axis=1), TINY)
    share = tl.div_rn(sizes, largest[:, None])
    share = share * (SHARE + 1) - share  # times SHARE, rounded once, as an FMA or not
    shares = (share + ROUNDER - ROUNDER).to(tl.int64)
    total = tl.maximum(tl.sum(shares, axis=1), 1)[:, None]
    room = tl.minimum(total * (PARTS * TOP) // SHARE, PARTS * MOST - PARTS // 2 * BITS)
    weights = (shares * room * 2 + total * PARTS) // (total * (2 * PARTS))
    return weights.to(tl.int32), steps


@triton.jit(do_not_specialize=["place"])
def encode_kernel(
    X, X2, WEIGHTS, BIASES, OUT, OUT2, STEPS, SLOPES, PLACES,
    HEAVY, DRAWN, CERTAIN, CHANCY, SPANS, VALUES, COUNTERS,
    x_batch, x_head, x_row, x2_batch, x2_head, x2_row, out2_batch, out2_head,
    places_batch, place, heavy_batch, heavy_list, drawn_batch, drawn_list,
    values_batch, values_head, values_token,
    programs, lists, second, share, share2, rows, rows2,
    IN: tl.constexpr, IN_SLOTS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    BITS: tl.constexpr, BIT_SLOTS: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr,
    FOLDS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, MOST: tl.constexpr,
    BLOCK: tl.constexpr, TILED: tl.constexpr, PLACED: tl.constexpr, PRICED: tl.constexpr,
    STEP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_SLOTS: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCK vectors of one head. Grid (blocks of rows, `programs` and maps of X2, batch).

    The first `programs` of axis 1 read X (batch, heads, rows, IN), each through GROUP maps whose
    pre-activations it adds, with `share` maps a head, and write OUT (batch, programs, rows, words)
    int32; where PLANES > 0, graded codes (..., words, 1 + PLANES) of weights that sum to MOST, and
    STEPS (batch, programs, rows): float32, what a unit of weight stands for, or if PRICED int64,
    what it costs at SLOPES (programs) float32 (see step.units_of).
    The others read X2, through one map each with `share2` maps a head, and write OUT2 likewise, as
    plain codes. If TILED, X2 is a cache of keys, and the code of its newest token goes into the
    tiles of a code cache: of token `place`, or if PLACED of the last of those that PLACES, int64,
    counts in each sequence.
    WEIGHTS, BIASES: of all maps, those of X2 from map `second` on, stage after stage, padded to the
    widths of the slots; a map's biases end with the steps of its FOLDS.

    STEP: also, for selection, CERTAIN (batch, lists) int64, the HEAVY tokens of each list, if
    PRICED less the DRAWN ones, which are CHANCY. VALUE_DIM > 0: also the COUNTERS of a step (see
    counters.py), by SPANS (batch, 1, 2), the newest key, and its value in VALUES, a cache too.
    """
    block = tl.program_id(0)
    index = tl.program_id(1)
    batch = tl.program_id(2)
    row = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, IN_SLOTS)
    other = index - programs
    newest = place
    if PLACED:
        newest = tl.load(PLACES + batch * places_batch).to(tl.int32) - 1
    if index < programs:
        x = X + batch.to(tl.int64) * x_batch + row[:, None].to(tl.int64) * x_row
        here = row < rows
    else:
        x = X2 + batch.to(tl.int64) * x2_batch + (other // share2).to(tl.int64) * x2_head
        x += (newest + row)[:, None].to(tl.int64) * x2_row
        here = row < rows2
    first = tl.where(index < programs, index * GROUP, second + other)
    members = tl.where(index < programs, GROUP, 1)
    GIVEN: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    FIRST: tl.constexpr = HIDDEN if DEPTH > 1 else 0
    MIDDLE: tl.constexpr = DEPTH - 2 if DEPTH > 2 else 0
    INNER: tl.constexpr = HIDDEN if DEPTH > 1 else IN_SLOTS
    SIZE: tl.constexpr = IN_SLOTS * FIRST + MIDDLE * HIDDEN * HIDDEN + INNER * BIT_SLOTS
    ADDED: tl.constexpr = FIRST + MIDDLE * HIDDEN + (1 + FOLDS) * BIT_SLOTS
    total = tl.zeros([BLOCK, BIT_SLOTS], tl.float32)
    strange = tl.zeros([BLOCK], tl.int32)  # numbers that are not finite
    for member in range(1 if GROUP == 1 else members):
        head = tl.where(index < programs, (first + member) // share, 0).to(tl.int64) * x_head
        given = tl.load(
            x + head + column[None, :], mask=here[:, None] & (column < IN)[None, :], other=0.0
        ).to(tl.float32)
        if VALUE_DIM > 0:
            strange = not_finite(given, 1)
        at = first + member
        total += preactivations(
            given, WEIGHTS + at.to(tl.int64) * SIZE, BIASES + at * ADDED, IN_SLOTS, WIDTHS, HIDDEN,
            BIT_SLOTS, DEPTH, ACTIVATION, FOLDS, GIVEN,
        )  # fmt: skip
    words = packed((total > 0).to(tl.int32), BLOCK, BIT_SLOTS)
    word = tl.arange(0, BIT_SLOTS // 32)[None, :]
    WORDS: tl.constexpr = BITS // 32
    inside = here[:, None] & (word < WORDS)
    if index < programs:
        line = (batch * programs + index).to(tl.int64) * rows
        out = OUT + ((line + row[:, None]) * WORDS + word) * (1 + PLANES)
        tl.store(out, words, mask=inside)
        if PLANES > 0:
            weights, steps = graded(total, BITS, PLANES, MOST)
            for plane in tl.static_range(PLANES):
                digit = packed((weights >> plane) & 1, BLOCK, BIT_SLOTS)
                tl.store(out + 1 + plane, digit, mask=inside)
            if PRICED:
                costs = tl.minimum(steps * UNIT * tl.load(SLOPES + index), COSTLIEST)
                costs = tl.maximum(costs + ROUNDER - ROUNDER, 1.0)
                tl.store(STEPS + line + row, costs.to(tl.int64), mask=here)
            else:
                tl.store(STEPS + line + row, steps, mask=here)
        if STEP:
            if index < lists:
                heavy = tl.load(HEAVY + batch * heavy_batch + index * heavy_list)
                if PRICED:
                    drawn = tl.load(DRAWN + batch * drawn_batch + index * drawn_list)
                    tl.store(CHANCY + batch * lists + index, drawn)
                    heavy -= drawn
                tl.store(CERTAIN + batch * lists + index, heavy)
    elif TILED:
        token = newest + row[:, None]
        tile = token // (LANES * COLUMNS) * WORDS + word
        within = token % LANES * COLUMNS + token // LANES % COLUMNS
        at = batch.to(tl.int64) * out2_batch + other.to(tl.int64) * out2_head
        tl.store(OUT2 + at + tile * (LANES * COLUMNS) + within, words, mask=inside)
        if VALUE_DIM > 0:
            value_dim = tl.arange(0, VALUE_SLOTS)
            value = VALUES + batch.to(tl.int64) * values_batch + value_dim
            value += (other // share2).to(tl.int64) * values_head
            value += newest.to(tl.int64) * values_token
            value = tl.load(value, mask=value_dim < VALUE_DIM, other=0.0).to(tl.float32)
            found = not_finite(value, 0) + tl.sum(strange, axis=0)
            tl.store(COUNTERS + NOT_FINITE, 1, mask=found > 0)
            if other == 0:
                seen = tl.load(SPANS + 2 * batch + 1) - tl.load(SPANS + 2 * batch)
                tl.store(COUNTERS + SEVERAL, 1, mask=seen < 0)
                tl.atomic_add(COUNTERS + SEEN, tl.maximum(seen, 0), sem="relaxed")
                tl.atomic_add(COUNTERS + ROWS, 1, sem="relaxed")
                tl.atomic_max(COUNTERS + LONGEST, newest + 1, sem="relaxed")
                if batch == 0:
                    tl.atomic_add(COUNTERS + CALLS, 1, sem="relaxed")
    else:
        at = (batch * (tl.num_programs(1) - programs) + other).to(tl.int64) * rows2
        tl.store(OUT2 + (at + row[:, None]) * WORDS + word, words, mask=inside)

"""Rows of 8 and 4 bits (see ..quantised), loaded as words of four bytes and decoded in registers.

Scales are left out of elements: those of K multiply logits, those of V weights. What bytes lack in
order, element 8 after element 0 at 4 bits, is made up for where queries are loaded and outputs
stored, once for a list.
"""

import triton
import triton.language as tl

from .. import quantised

CURVE = tl.constexpr(quantised.CURVE)
LEVELS = tl.constexpr(128.0)  # what codes of 8 bits are divided by: float16 has no room for them


@triton.jit
def element(place, BITS: tl.constexpr):
    """Which element of a vector stands at `place` of `decoded`."""
    if BITS == 4:  # byte i of eight: element i of 16, then element 8 + i
        return place // 16 * 16 + place % 2 * 8 + place // 2 % 8
    else:
        return place


@triton.jit
def decoded(words, BITS: tl.constexpr):
    """int32 words (rows, n) -> float32 (rows, 32 / BITS * n), codes without their scale."""
    COUNT: tl.constexpr = 32 // BITS
    shifts = tl.arange(0, COUNT) * BITS
    if BITS == 8:
        codes = (words[:, :, None] << (24 - shifts)[None, None, :]) >> 24  # with their sign
        levels = codes.to(tl.float32) / LEVELS
    else:
        codes = (words[:, :, None] >> shifts[None, None, :]) & 15
        x = codes.to(tl.float32) / 8 - 15 / 16
        levels = x * (CURVE + x * x)
    return tl.reshape(levels, (words.shape[0], COUNT * words.shape[1]))


@triton.jit
def scales(word, BITS: tl.constexpr):
    """The scales of K and of V in the last word of a row, for numbers of `decoded`."""
    key = (word << 16).to(tl.float32, bitcast=True)
    value = (word & -65536).to(tl.float32, bitcast=True)
    if BITS == 8:
        return key * LEVELS, value * LEVELS
    else:
        return key, value

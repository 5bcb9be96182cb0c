"""Words of 32 bits in Triton: counting ones, shifting, masks of token ranges.

Inline assembly is the only code that the interpreter cannot run; it runs the plain expression next
to each. `self_test` compares both with Python integers, on a GPU too.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def popcount(x):
    """Ones in each int32.

    Assembly, because LLVM recognises the sum of masked shifts (Hacker's Delight, figure 5-2) only
    where no XOR with a scalar precedes it, and here one always does.
    """
    if INTERPRET:
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def shift_left(x, by):
    """x << by, and 0 where `by` is not in [0, 32): PTX clamps there, LLVM's shift is undefined."""
    if INTERPRET:
        return tl.where((by >= 0) & (by < 32), x << (by & 31), 0)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $1, $2;", "=r,r,r", [x, by], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def differing(x, y, mask):
    """(x ^ y) & mask in one instruction, which the compiler splits where x ^ y recurs."""
    if INTERPRET:
        return (x ^ y) & mask
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x28;", "=r,r,r,r", [x, y, mask], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def dot_bytes(x, y, start):
    """start plus the products of the four unsigned bytes of each x and y: one instruction."""
    if INTERPRET:
        for byte in tl.static_range(4):
            start += ((x >> (8 * byte)) & 0xFF) * ((y >> (8 * byte)) & 0xFF)
        return start
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, start], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def part(packed, place: tl.constexpr, parts: tl.constexpr, start):
    """start plus the unsigned number at `place` of the 4 or 2 `parts` of each word."""
    if parts == 4:
        return dot_bytes(packed, packed * 0 + (1 << (8 * place)), start)
    else:
        return ((packed >> (16 * place)) & 0xFFFF) + start


@triton.jit
def push_sign(word, x):
    """word << 1, its lowest bit set where x is negative: one funnel shift."""
    sign = x.to(tl.uint32, bitcast=True) >> 31
    return (word << 1) | sign.to(tl.int32, bitcast=True)


@triton.jit
def lowest(word):
    """Position of the lowest one of each int32; 32 where there is none."""
    return popcount(~word & (word - 1))


@triton.jit
def below(count):
    """int32 words whose lowest `count` bits are ones, count clamped to [0, 32]."""
    count = tl.minimum(tl.maximum(count, 0), 32)
    return shift_left(count * 0 + 1, count) - 1


@triton.jit
def range_mask(word, first, last):
    """Bits of the tokens [first, last) in words of 32 tokens: bit j of word w is token 32 w + j."""
    return below(last - 32 * word) & ~below(first - 32 * word)


@triton.jit
def emit(out, position, word, ones):
    """Write the tokens whose bits are set, ascending, from `position` on."""
    for _ in range(tl.max(popcount(ones), axis=0)):
        tl.store(out + position, 32 * word + lowest(ones), mask=ones != 0)
        ones = ones & (ones - 1)
        position += 1

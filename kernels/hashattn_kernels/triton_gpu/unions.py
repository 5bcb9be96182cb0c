"""The union of a group's token lists: mark the tokens in a bitmap, then write it out."""

import triton
import triton.language as tl

from .bits import emit, popcount


@triton.jit
def mark_kernel(INDICES, BITMAP, members, lists, q_len, width, words, BLOCK: tl.constexpr):
    """Set the bits of all listed tokens. Grid (blocks of width, batch * lists * members * q_len).

    BITMAP (batch * lists * q_len, words) int32, zero before; OR is the same in any order.
    """
    row = tl.program_id(1)
    union = row // (members * q_len) * q_len + row % q_len
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(INDICES + row.to(tl.int64) * width + slot, mask=slot < width, other=-1)
    bit = (token * 0 + 1) << (token & 31)
    word = BITMAP + union.to(tl.int64) * words + (token >> 5)
    tl.atomic_or(word, bit, mask=token >= 0, sem="relaxed")


@triton.jit
def write_kernel(BITMAP, INDICES, words, width, BLOCK: tl.constexpr):
    """Write the tokens of BLOCK words, after those of all earlier words, which each program counts
    again: reading a bitmap is cheaper than a launch. Grid (chunks, rows); the last pads with -1."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    bitmap = BITMAP + row.to(tl.int64) * words
    slot = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for earlier in range(chunk):
        counts += popcount(tl.load(bitmap + earlier * BLOCK + slot))
    position = tl.sum(counts, axis=0)
    word = chunk * BLOCK + slot
    ones = tl.load(bitmap + word, mask=word < words, other=0)
    counts = popcount(ones)
    out = INDICES + row.to(tl.int64) * width
    emit(out, position + tl.cumsum(counts, axis=0) - counts, word, ones)
    if chunk == tl.num_programs(0) - 1:
        for start in range(position + tl.sum(counts, axis=0), width, BLOCK):
            tl.store(out + start + slot, slot * 0 - 1, mask=start + slot < width)

"""Hamming distances as small levels, shared by the kernels that score codes.

A list sums the distances of its `group` query heads. With c of them having bit j set, a key bit
costs c or group - c, so the sum is a constant plus |group - 2 c| for every bit that differs from
the majority; for an even group all of these are even. That leaves the weights
|group - 2 c| >> (group is even), and their binary digits are masks:

    level = sum over digits p of 2^p * popcount((key ^ majority) & mask_p)

has the order and the ties of the sum of distances, in few popcounts: one for one or two heads, two
for four, three for eight. A graded query has this form already: its signs are the majority, the
planes of its weights the masks.
"""

import triton
import triton.language as tl

from .bits import popcount

LANES = tl.constexpr(32)  # tokens of a thread in a tile, as in codes.Tiled
COLUMNS = tl.constexpr(128)  # threads of a tile


def digits(group: int, grades: int = 0) -> int:
    """Masks of a word: binary digits of the heaviest weight, or the planes of a graded query."""
    return grades or (group >> (group % 2 == 0)).bit_length()


def levels(group: int, words: int, grades: int = 0, most: int | None = None) -> int:
    """The highest level of a key of `words` words; most: what a graded query's weights sum to."""
    heaviest = 2**grades - 1 if grades else group >> (group % 2 == 0)
    highest = 32 * words * heaviest
    return min(most, highest) if grades and most is not None else highest


@triton.jit
def code_masks(queries, query, q_len, GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
               DIGITS: tl.constexpr, GRADED: tl.constexpr):  # fmt: skip
    """Of every word: the majority, then a mask for each digit, as one tuple of scalars.

    queries: address of the first head's code; query: row of `q_len`, stored head by head. SLOTS:
    GROUP rounded up to a power of 2. GRADED: the words of a list's one query are this tuple.
    """
    masks = ()
    if GRADED:
        for slot in tl.static_range(WORDS * (1 + DIGITS)):
            masks = masks + (tl.load(queries + query * (WORDS * (1 + DIGITS)) + slot),)
    else:
        head = tl.arange(0, SLOTS)
        lane = tl.arange(0, 32)
        for word in tl.static_range(WORDS):
            at = queries + (head * q_len + query) * WORDS + word
            codes = tl.load(at, mask=head < GROUP, other=0)
            ones = tl.sum((codes[:, None] >> lane[None, :]) & 1, axis=0)
            masks = masks + (tl.sum((2 * ones > GROUP).to(tl.int32) << lane, axis=0),)
            weight = tl.abs(GROUP - 2 * ones) >> (1 - GROUP % 2)
            for digit in tl.static_range(DIGITS):
                masks = masks + (tl.sum(((weight >> digit) & 1) << lane, axis=0),)
    return masks


@triton.jit
def level(keys, masks, WORDS: tl.constexpr, DIGITS: tl.constexpr):
    """Levels of the keys at these addresses of a tile; the words of a key are a tile apart."""
    total = 0
    for word in tl.static_range(WORDS):
        differ = tl.load(keys + word * (LANES * COLUMNS)) ^ masks[word * (1 + DIGITS)]
        for digit in tl.static_range(DIGITS):
            ones = popcount(differ & masks[word * (1 + DIGITS) + 1 + digit])
            total += ones << digit
    return total


@triton.jit
def row_range(SPANS, row, sink, local):
    """Tokens that a row sees, [first, last), and those that it chooses from, [low, high)."""
    first = tl.load(SPANS + 2 * row).to(tl.int32)
    last = tl.maximum(tl.load(SPANS + 2 * row + 1).to(tl.int32), first)
    low = tl.minimum(first + sink, last)
    high = tl.maximum(last - local, low)
    return first, last, low, high

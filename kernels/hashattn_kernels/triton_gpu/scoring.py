"""Hamming distances as small levels, shared by the kernels that score codes.

A list sums the distances of its `group` query heads. With c of them having bit j set, a key bit
costs c or group - c, so the sum is a constant plus |group - 2 c| for every bit that differs from
the majority; for an even group all of these are even. That leaves the weights
|group - 2 c| >> (group is even), and their binary digits are masks:

    level = sum over digits p of 2^p * popcount((key ^ majority) & mask_p)

has the order and the ties of the sum of distances, in few popcounts: one for one or two heads, two
for four, three for eight. A graded query has this form already: its signs are the majority, the
planes of its weights the masks.

With three digits or more, products of bytes are cheaper than popcounts: (key ^ majority) &
0x01010101 << j has bit j of every byte, and one instruction adds their products with four weights.
Bits of a group that stand g places apart are worth 2^0 to 2^(g - 1) there, which weights scaled the
other way make equal; a shift of the sum leads from a group to the next.
"""

import triton
import triton.language as tl

from .bits import differing, dot_bytes, popcount

LANES = tl.constexpr(32)  # tokens of a thread in a tile, as in codes.Tiled
COLUMNS = tl.constexpr(128)  # threads of a tile
BINS = tl.constexpr(32)  # counters of a level's digit: one bit of a word each


def digits(group: int, grades: int = 0) -> int:
    """Masks of a word: binary digits of the heaviest weight, or the planes of a graded query."""
    return grades or (group >> (group % 2 == 0)).bit_length()


def levels(group: int, words: int, grades: int = 0, most: int | None = None) -> int:
    """The highest level of a key of `words` words; most: what a graded query's weights sum to."""
    heaviest = 2**grades - 1 if grades else group >> (group % 2 == 0)
    highest = 32 * words * heaviest
    return min(most, highest) if grades and most is not None else highest


def weighed(digits: int) -> bool:
    """Whether levels are sums of products of bytes, into which weights of so many digits fit."""
    return 3 <= digits <= 8


@triton.jit
def code_masks(queries, query, q_len, GROUP: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
               DIGITS: tl.constexpr, GRADED: tl.constexpr, WEIGHED: tl.constexpr):  # fmt: skip
    """Of every word: the majority, then a mask for each digit, as one tuple of scalars; WEIGHED:
    the majority, then for j in 0 to 7 the weights of bits j, 8 + j, 16 + j and 24 + j as bytes.

    queries: address of the first head's code; query: row of `q_len`, stored head by head. SLOTS:
    GROUP rounded up to a power of 2. GRADED: the words of a list's one query are this tuple.
    """
    masks = ()
    if GRADED:
        for word in tl.static_range(WORDS):
            at = queries + query * (WORDS * (1 + DIGITS)) + word * (1 + DIGITS)
            planes = ()
            for slot in tl.static_range(1 + DIGITS):
                planes = planes + (tl.load(at + slot),)
            masks = masks + (_byte_weights(planes, DIGITS) if WEIGHED else planes)
    else:
        head = tl.arange(0, SLOTS)
        lane = tl.arange(0, 32)
        for word in tl.static_range(WORDS):
            at = queries + (head * q_len + query) * WORDS + word
            codes = tl.load(at, mask=head < GROUP, other=0)
            ones = tl.sum((codes[:, None] >> lane[None, :]) & 1, axis=0)
            planes = (tl.sum((2 * ones > GROUP).to(tl.int32) << lane, axis=0),)
            weight = tl.abs(GROUP - 2 * ones) >> (1 - GROUP % 2)
            for digit in tl.static_range(DIGITS):
                planes = planes + (tl.sum(((weight >> digit) & 1) << lane, axis=0),)
            masks = masks + (_byte_weights(planes, DIGITS) if WEIGHED else planes)
    return masks


@triton.jit
def _byte_weights(planes, DIGITS: tl.constexpr):
    """The majority, then the weights of a word's bits, bit j of every byte in the j-th word: the
    weight times 2^(8 - DIGITS - j % (9 - DIGITS))."""
    made = (planes[0],)
    for bit in tl.static_range(8):
        weights = 0
        for digit in tl.static_range(DIGITS):
            weights |= _moved(planes[1 + digit], bit, digit + 8 - DIGITS - bit % (9 - DIGITS))
        made = made + (weights,)
    return made


@triton.jit
def _moved(word, bit: tl.constexpr, to: tl.constexpr):
    """A bit of every byte, at another place of its byte."""
    moved = word << (to - bit) if to >= bit else word >> (bit - to)
    return moved & _bit_of_bytes(to)


@triton.jit
def _bit_of_bytes(bit: tl.constexpr):
    """An int32 with this bit of every byte."""
    return -0x7F7F7F80 if bit == 7 else 0x01010101 << bit


@triton.jit
def level(keys, masks, WORDS: tl.constexpr, DIGITS: tl.constexpr, WEIGHED: tl.constexpr):
    """Levels of the keys at these addresses of a tile; the words of a key are a tile apart."""
    words = ()
    for word in tl.static_range(WORDS):
        words = words + (tl.load(keys + word * (LANES * COLUMNS)),)
    total = words[0] * 0
    if WEIGHED:
        for bit in tl.static_range(7, -1, -1):
            for word in tl.static_range(WORDS):
                ones = differing(words[word], masks[9 * word], _bit_of_bytes(bit))
                total = dot_bytes(ones, masks[9 * word + 1 + bit], total)
            if bit == 0:
                total >>= 8 - DIGITS
            elif bit % (9 - DIGITS) == 0:
                total >>= 9 - DIGITS
    else:
        for word in tl.static_range(WORDS):
            differ = words[word] ^ masks[word * (1 + DIGITS)]
            for digit in tl.static_range(DIGITS):
                total += popcount(differ & masks[word * (1 + DIGITS) + 1 + digit]) << digit
    return total


@triton.jit
def row_range(SPANS, row, sink, local):
    """Tokens that a row sees, [first, last), and those that it chooses from, [low, high)."""
    first = tl.load(SPANS + 2 * row).to(tl.int32)
    last = tl.maximum(tl.load(SPANS + 2 * row + 1).to(tl.int32), first)
    low = tl.minimum(first + sink, last)
    high = tl.maximum(last - local, low)
    return first, last, low, high

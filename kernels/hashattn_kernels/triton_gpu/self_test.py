"""Tests the inline assembly of `bits` with Python integers: the interpreter does not run it."""

import torch
import triton
import triton.language as tl

from .bits import below, lowest, popcount, shift_left

EDGES = (0, 1, 2, 3, 31, 32, 33, 63, 64, 2**31 - 1, -1, -2, -31, -32, -33, -(2**31))


@triton.jit
def bits_kernel(X, BY, ONES, SHIFTED, LOWEST, BELOW, n, BLOCK: tl.constexpr):
    """popcount(x), x << by, the lowest one of x and below(by). Grid (blocks of n)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(X + at, mask=inside, other=0)
    by = tl.load(BY + at, mask=inside, other=0)
    tl.store(ONES + at, popcount(x), mask=inside)
    tl.store(SHIFTED + at, shift_left(x, by), mask=inside)
    tl.store(LOWEST + at, lowest(x), mask=inside)
    tl.store(BELOW + at, below(by), mask=inside)


def self_test(device: torch.device | str) -> list[str]:
    """Names of the functions that give a wrong result on this device; empty if none does."""
    x, by = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)).unbind(1)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2, 1000), generator=generator)
    x, by = torch.cat((x, random[0])), torch.cat((by, random[1] % 40 - 4))
    arguments = [t.to(device, torch.int32) for t in (x, by)]
    outputs = [torch.full_like(arguments[0], -7) for _ in range(4)]
    bits_kernel[(triton.cdiv(len(x), 128),)](*arguments, *outputs, len(x), BLOCK=128)
    found = zip(*(out.tolist() for out in outputs), strict=True)
    wrong = set()
    names = ("popcount", "shift_left", "lowest", "below")
    for value, shift, answers in zip(x.tolist(), by.tolist(), found, strict=True):
        word = value & 0xFFFFFFFF
        right = (
            word.bit_count(),
            word << shift & 0xFFFFFFFF if 0 <= shift < 32 else 0,
            (word & -word).bit_length() - 1 if word else 32,
            (1 << min(max(shift, 0), 32)) - 1,
        )
        wrong |= {
            name
            for name, answer, truth in zip(names, answers, right, strict=True)
            if answer & 0xFFFFFFFF != truth
        }
    return sorted(wrong)

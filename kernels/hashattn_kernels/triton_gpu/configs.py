"""Block sizes and warps by problem: the shipped configurations, all of which `gate` compiles.

Chosen by bytes in flight, registers and instruction counts; measurements on a device may find
better ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton import next_power_of_2

from .scoring import BINS, digits, levels, weighed

WARPS = 4  # of the selection kernels: 128 threads, one column of a tile each
REGISTERS = 96  # of their threads at most: the compiler would take 30 more for some
MORE_REGISTERS = 128  # where it would otherwise spill some: long codes that are not graded
SELECT_OPTIONS = {"num_warps": WARPS, "maxnreg": REGISTERS}
PLAN_BLOCK = 32  # chunks whose counts a program reads at a time
MOST_LEVELS = 4096  # whose code is short enough to compile
MOST_SURVEYED = 1024  # levels that a program of sampling's survey counts
PROGRAMS = 4  # programs that a kernel should start for each multiprocessor
MULTIPROCESSORS = 132  # of an H100 or H200: assumed where there is no GPU
MERGE_BLOCK = 16  # parts, at most
MERGE_SIZE = 4096  # numbers of the parts that are merged at a time
MARK_BLOCK = WRITE_BLOCK = 1024  # tokens of a list, words of a bitmap
SURVEY_BLOCK = 512  # candidates
COUNT_BLOCK = 256  # chunks


@dataclass(frozen=True)
class Encode:
    """Vectors of a program and its warps."""

    block: int
    warps: int


@dataclass(frozen=True)
class Select:
    """How a row's tokens are scored: see scoring.code_masks and selection.histogram_kernel.

    grades: planes of a graded query, 0 for plain codes; most: what its weights sum to at most.
    """

    group: int
    words: int
    tiles: int
    grades: int = 0
    most: int | None = None

    @property
    def highest(self) -> int:
        """The highest level of a key."""
        return levels(self.group, self.words, self.grades, self.most)

    @property
    def pack(self) -> int:
        """Levels stored in a word of 32 bits."""
        return 4 if self.highest < 2**8 else 2

    @property
    def shifts(self) -> tuple[int, ...]:
        """Where a level's digits of 5 bits begin, from the highest, of which there may be 33."""
        bins, highest = BINS.value, 0
        while self.highest >> highest > bins:
            highest += 1
        return (*range(highest, 0, 1 - bins.bit_length()), 0)

    @property
    def storing(self) -> dict[str, int]:
        """Constants of the kernels that read stored levels."""
        return {"PACK": self.pack, "TILES": self.tiles}

    @property
    def counting(self) -> dict[str, int]:
        """Constants of the histogram kernel."""
        count = digits(self.group, self.grades)
        sizes = {"GROUP": self.group, "SLOTS": next_power_of_2(self.group), "WORDS": self.words}
        sizes |= {"DIGITS": count, "QUERY_WORDS": self.words * (1 + self.grades)}
        sizes |= {"WEIGHED": weighed(count), "SHIFT": self.shifts[0]}
        return sizes | self.storing | {"BLOCK": PLAN_BLOCK}

    @property
    def refining(self) -> tuple[dict[str, int], ...]:
        """Constants of the refine kernel, for each digit after the highest."""
        return tuple(
            {"SHIFT": shift} | self.storing | {"BLOCK": PLAN_BLOCK} for shift in self.shifts[1:]
        )

    @property
    def options(self) -> dict[str, int]:
        """How to compile the histogram."""
        registers = REGISTERS if self.grades or self.words < 4 else MORE_REGISTERS
        return SELECT_OPTIONS | {"maxnreg": registers}

    @property
    def slots(self) -> float | None:
        """Issue slots a key that the histogram may take, where there is a limit."""
        return HISTOGRAM_SLOTS.get(32 * self.words) if self.grades else None

    @property
    def surveying(self) -> dict[str, int]:
        """Constants of sampling.survey_kernel: all levels fit below a power of 2."""
        return self.storing | {"BINS": next_power_of_2(self.highest + 1), "AT_ONCE": SURVEY_BLOCK}


@dataclass(frozen=True)
class Attend:
    """Tokens of a step of a program, its warps, and the stages of its pipeline of loads."""

    block: int
    warps: int
    stages: int


DECODE, PREFILL = Encode(16, 8), Encode(64, 8)
TILES = (1, 4)  # of a chunk: one while there are few tiles, so that all multiprocessors work
GROUPS = (1, 2, 4, 8)  # query heads of a list that the gate compiles
BITS = (32, 64, 128, 256)
GRADES = {32: (5, 255), 64: (5, 255), 128: (6, 1023)}  # bits: planes of a query, their weights' sum
HISTOGRAM_SLOTS = {32: 24.75, 64: 42, 128: 76}  # bits of graded codes: issue slots a key, at most
REFINE_SLOTS = {4: 5.25, 2: 6}  # levels in a word: the same, of the second digit
EDGE_SLOTS = 5  # more in chunks at the edges of a span
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def encode_config(
    rows: int,
    dim: int,
    widest: int,
    depth: int,
    dtype: torch.dtype,
    half: bool,
    graded: bool = False,
) -> Encode:
    """For `rows` vectors of a head; half: the weights are bfloat16.

    More than two stages, wider ones, grades, or vectors that take two products leave no registers
    for many vectors.
    """
    short = dtype == torch.bfloat16 or dim <= 64
    fits = half and short and not graded and depth <= 2 and max(dim, widest) <= 128
    return PREFILL if fits and rows > DECODE.block else DECODE


def select_config(
    group: int,
    words: int,
    grades: int,
    rows: int,
    tiles: int,
    device: torch.device,
    most: int | None = None,
) -> Select:
    """For `rows` lists over `tiles` tiles of tokens."""
    many = rows * tiles >= TILES[1] * PROGRAMS * multiprocessors(device)
    return Select(group, words, TILES[1] if many else TILES[0], grades, most)


def attend_config(dim: int, dtype: torch.dtype, bits: int = 0) -> Attend:
    """For the wider of the head dims of K and V; bits: of quantised rows."""
    if dtype == torch.float32:  # no tensor cores: products in registers
        return Attend(16 if bits and dim > 64 else 32, 8, 2)
    if dim > 128:
        return Attend(32, 4, 2)
    return Attend(64, 4, 2 if bits == 4 else 3)  # a third stage of half bytes spills


def head_slots(group: int, bits: int) -> int:
    """Rows of an attention program's query tile. A single head needs no more than its own, but for
    quantised rows, for which Triton 3.7 fails to compile that."""
    return 1 if group == 1 and not bits else max(16, next_power_of_2(group))


def merged(heads: int, value_slots: int) -> int:
    """Parts of `heads` heads that the last program of a list merges at a time."""
    return max(1, min(MERGE_BLOCK, MERGE_SIZE // (heads * value_slots)))


def split_of(width: int, rows: int, block: int, device: torch.device) -> int:
    """Tokens of a part, so that `rows` lists of `width` tokens keep the device busy."""
    parts = -(-PROGRAMS * multiprocessors(device) // rows)
    return block * max(1, -(-width // (parts * block)))


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

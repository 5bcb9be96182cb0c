"""Block sizes and warps by problem: the shipped configurations, all of which `gate` compiles.

Chosen by bytes in flight, registers and instruction counts; measurements on a device may find
better ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton import next_power_of_2

from .scoring import digits, levels

WARPS = 4  # of the selection kernels: 128 threads, one column of a tile each
MOST_HOT = 8  # one-hot words of a level that fit in registers, with their digits
MOST_LEVELS = 1024  # that a histogram in registers holds
MOST_BINS = 4096  # levels that a program can count at all
PROGRAMS = 4  # programs that a kernel should start for each multiprocessor
MULTIPROCESSORS = 132  # of an H100 or H200: assumed where there is no GPU
MERGE_BLOCK = 16  # parts, at most
MERGE_SIZE = 8192  # numbers of the parts that are merged at a time
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
    def hot(self) -> int:
        """One-hot words that hold every level but the highest."""
        return next_power_of_2(-(-levels(self.group, self.words, self.grades, self.most) // 32))

    @property
    def wide(self) -> bool:
        """More levels than histogram_kernel holds in registers."""
        return self.hot > MOST_HOT

    @property
    def scoring(self) -> dict[str, int]:
        """Constants of both selection kernels."""
        slots = next_power_of_2(self.group)
        sizes = {"DIGITS": digits(self.group, self.grades), "TILES": self.tiles}
        words = {"WORDS": self.words, "QUERY_WORDS": self.words * (1 + self.grades)}
        return {"GROUP": self.group, "SLOTS": slots} | words | sizes

    @property
    def counting(self) -> dict[str, int]:
        """Constants of the histogram kernels."""
        block = min(128, max(4, 2048 // (32 * self.hot)))
        return self.scoring | {"HOT": self.hot, "BLOCK": block}

    @property
    def surveying(self) -> dict[str, int]:
        """Constants of sampling.survey_kernel: all levels fit below a power of 2."""
        highest = levels(self.group, self.words, self.grades, self.most)
        sizes = {name: size for name, size in self.scoring.items() if name != "TILES"}
        return sizes | {"BINS": next_power_of_2(highest + 1), "AT_ONCE": SURVEY_BLOCK}


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


def attend_config(dim: int, dtype: torch.dtype) -> Attend:
    """For the wider of the head dims of K and V."""
    if dtype == torch.float32:  # no tensor cores: products in registers
        return Attend(32, 8, 2)
    return Attend(32, 4, 2) if dim > 128 else Attend(64, 4, 3)


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

"""Coins of priority sampling: exponential random numbers, a pure function of their counters.

A coin of a token is a number E with P(E >= c) = exp(-c): a token whose weight is exp(-c) times the
threshold's is read when its coin is at least c. Coins are whole numbers of 1 / NAT nats, taken from
one table of exact quantiles in a fixed, scattered order; a counter (seed, layer, list, step, block
of tokens) says where in the table a block begins. So every backend reads the same coins, whatever
the batch, the threads or the order of work, and the chance of a cost is known exactly: `CHANCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

NAT = 2048  # coins are multiples of 1 / NAT nats
SIZE = 1 << 16  # entries of the table
BLOCK = 4096  # tokens that lie side by side in the table
LARGEST = 10 * NAT  # a cost that some coins still reach: 3 of SIZE
DEAREST = 1 << 14  # cost of a unit of distance, at most: eight nats
SURVEYED = 4096  # candidates of a row that set the threshold, at most
MASK = (1 << 32) - 1


def _quantiles() -> np.ndarray:
    return np.rint(-NAT * np.log((np.arange(SIZE) + 0.5) / SIZE)).astype(np.int32)


def _scattered() -> np.ndarray:
    """A fixed order of 0 .. SIZE - 1: rounds of odd multiplications and shifts, all invertible."""
    x = np.arange(SIZE, dtype=np.uint32)
    for factor, shift in ((0x9E6D, 7), (0x58AD, 9), (0xC2B3, 8)):
        x = (x * np.uint32(factor)) & np.uint32(SIZE - 1)
        x ^= x >> np.uint32(shift)
    return x


TABLE = _quantiles()[_scattered()]
# CHANCES[c]: how many of SIZE coins are at least c
CHANCES = (SIZE - np.searchsorted(np.sort(TABLE), np.arange(LARGEST + 1))).astype(np.int64)
LOG_WEIGHTS = np.log(SIZE / CHANCES).astype(np.float32)


@cache
def table(device: torch.device, name: str) -> Tensor:
    """TABLE, CHANCES or LOG_WEIGHTS as a tensor of a device."""
    return torch.from_numpy(globals()[name]).to(device)


def parts_of(trust: float) -> int:
    """`trust` in SIZE-ths, at least one: thresholds are integers, the same on every backend.

    ValueError unless it is a number in (0, 1].
    """
    if not 0 < trust <= 1:
        raise ValueError(f"trust = {trust}: must be a number in (0, 1]")
    return max(1, round(trust * SIZE))


@dataclass(frozen=True)
class Coins:
    """Which coins a layer's call takes.

    first_list: of the layer's lists, the first that this process holds. fresh: other coins at every
    step, else a token keeps its coin.
    """

    seed: int = 0
    layer: int = 0
    first_list: int = 0
    fresh: bool = True

    @cached_property
    def state(self) -> int:
        """Seed and layer, mixed."""
        words = [self.seed & MASK, self.seed >> 32 & MASK, self.layer]
        state = 0
        for word in words:
            state = _mixed(state, word)
        return state

    def starts(self, lists: int, steps: Tensor, blocks: int) -> Tensor:
        """Where in the table each block begins: int64 (batch, lists, q, blocks).

        steps (batch, q) int64: how many tokens each row sees.
        """
        device = steps.device
        line = torch.arange(self.first_list, self.first_list + lists, device=device)
        state = _mixed(self.state, line)[None, :, None]
        state = _mixed(state, (steps if self.fresh else torch.zeros_like(steps))[:, None])
        state = _mixed(state[..., None], torch.arange(blocks, device=device))
        return state & (SIZE - 1)

    def of(self, lists: int, steps: Tensor, places: Tensor) -> Tensor:
        """Coins (batch, lists, q, n) int32 of the tokens at places (batch or 1, n) int64, which
        count a row's visible tokens."""
        places = places.expand(len(steps), -1)
        blocks = int(places.max()) // BLOCK + 1 if places.numel() else 1
        starts = self.starts(lists, steps, blocks)
        block = (places // BLOCK)[:, None, None].expand(*starts.shape[:3], -1)
        at = starts.gather(-1, block) + (places % BLOCK)[:, None, None]
        return table(places.device, "TABLE")[at & (SIZE - 1)]


def _mixed(state, number):
    """32 bits of a state and a number, well mixed; ints, or int64 tensors of unsigned numbers."""
    x = (state ^ (number * 0x9E3779B9 & MASK)) & MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ x >> shift) * factor & MASK
    return x ^ x >> 15

"""What the decode steps of a layer add up on their device, for a receipt to read when it is asked.

One tensor (7,) int64 a layer: reading it waits for a GPU, adding to it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

# calls; batch rows of all calls; tokens that they saw; tokens listed, over all lists; the most
# tokens cached; whether a key or value was not finite; whether a row saw several spans of tokens,
# which masks.static_spans tells by one that ends before it begins
CALLS, ROWS, SEEN, READ, LONGEST, NOT_FINITE, SEVERAL = range(7)
COUNTED = ("calls", "rows", "cached", "read", "longest")  # the first, as receipts name them


def new_counters(device: torch.device | str) -> Tensor:
    """Counters of a layer on a device, all 0."""
    return torch.zeros(7, dtype=torch.int64, device=device)


def count_dense(counters: Tensor, rows: int, seen: Tensor, longest: Tensor | int) -> None:
    """Add a dense call of `rows` rows that saw, and so read, `seen` () tokens, of `longest`."""
    seen = seen.to(torch.int64)
    one, longest = torch.ones_like(seen), torch.clamp(counters[LONGEST], min=longest)
    grown = longest - counters[LONGEST]
    counters.add_(torch.stack((one, rows * one, seen, seen, grown, 0 * one, 0 * one)))


def count_step(
    counters: Tensor, spans: Tensor, indices: Tensor, n: int, key: Tensor, value: Tensor
) -> None:
    """Add a step, as a backend's own kernels may.

    spans (batch, 1, 2) and indices (batch, lists, 1, width) of the step; n: tokens cached; key and
    value (batch, kv_heads, 1, dim): the newest token's.
    """
    first, last = spans[..., 0], spans[..., 1]
    counters[CALLS] += 1
    counters[ROWS] += len(spans)
    counters[SEEN] += (last - first).clamp(min=0).sum()
    counters[READ] += (indices >= 0).sum()
    counters[LONGEST].clamp_(min=n)
    counters[NOT_FINITE] |= ((key * 0).sum() + (value * 0).sum()).isnan()
    counters[SEVERAL] |= (last < first).any()

"""Whether a model's keys and values are finite: codes of NaN look like any others."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection

import torch
from torch import Tensor

from hashattn.base.errors import NonFiniteError


class FiniteWatch:
    """Checks every new key and value once.

    On a CPU a NaN or infinite one is refused at once. On other devices the step would have to wait
    for the result, so sums are kept there, which stay non-finite after one such number, and
    `verify` checks them.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, torch.device], Tensor] = {}
        self._lock = threading.Lock()

    def check(self, layer: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Check keys and values (batch, kv_heads, n, dim) from token `start` on.

        Raises NonFiniteError, on a CPU.
        """
        sums = [part[:, :, start:].detach().sum(dtype=torch.float32) for part in (keys, values)]
        if keys.is_cpu:
            if not all(math.isfinite(total) for total in sums):
                raise non_finite(layer)
            return
        with self._lock:
            running = self._sums.setdefault((layer, keys.device), torch.zeros_like(sums[0]))
            for total in sums:
                running.add_(total)

    def verify(self, seen: Collection[int] = ()) -> None:
        """Raise NonFiniteError for the first layer that had a NaN or infinite key or value; seen:
        layers where a kernel saw one."""
        if seen:
            raise non_finite(min(seen))
        for (layer, _), total in sorted(self._sums.items(), key=lambda item: item[0][0]):
            if not math.isfinite(total):
                raise non_finite(layer)


def non_finite(layer: int) -> NonFiniteError:
    """The error for keys or values that are NaN or infinite: codes of such keys look like any
    others, and mean nothing."""
    return NonFiniteError(
        f"layer {layer}: keys or values hold NaN or infinite numbers. No selection among them "
        "means anything, and dense attention would give NaN: look for an overflow of float16 "
        "(load the model in bfloat16 or float32) or for damaged weights"
    )

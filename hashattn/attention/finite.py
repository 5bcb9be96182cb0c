"""Whether a model computes numbers at all: codes of NaN look like any others."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from hashattn.attention.refusals import refuse_non_finite


class FiniteWatch:
    """Looks at every new key and value once.

    On a CPU a NaN or infinite one is refused at once. Elsewhere the layer's step would have to wait
    for the device, so sums are kept there, which one such number spoils for good, and `verify`
    looks at them.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, torch.device], Tensor] = {}
        self._lock = threading.Lock()

    def check(self, layer: int, keys: Tensor, values: Tensor, start: int) -> None:
        """keys, values (batch, kv_heads, n, dim): look at the tokens from `start` on.

        Raises NonFiniteError.
        """
        sums = [part[:, :, start:].detach().sum(dtype=torch.float32) for part in (keys, values)]
        if keys.is_cpu:
            if not all(math.isfinite(total) for total in sums):
                refuse_non_finite(layer)
            return
        with self._lock:
            kept = self._sums.setdefault((layer, keys.device), torch.zeros_like(sums[0]))
            for total in sums:
                kept.add_(total)

    def verify(self) -> None:
        """NonFiniteError for the first layer that had a NaN or infinite key or value."""
        for (layer, _), total in sorted(self._sums.items(), key=lambda item: item[0][0]):
            if not math.isfinite(total):
                refuse_non_finite(layer)

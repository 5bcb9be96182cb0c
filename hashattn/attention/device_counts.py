"""What sparse steps read, counted by the kernels on their device.

A receipt that counts itself waits for a GPU at every step, or launches kernels of its own. These
counters are a part of the step's launches, and of a CUDA graph; receipts read them when asked.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hashattn.base.errors import UnsupportedModelError
from hashattn.kernels import COUNTED, NOT_FINITE, SEVERAL, new_counters


def counted_there(device: torch.device) -> bool:
    """Whether steps of a device are counted there: not in main memory, where reading is free."""
    return device.type != "cpu"


@dataclass
class DeviceCounts:
    """Counters of an attachment, by layer and reason (receipt.Count); lists: token lists of a
    layer's sparse calls, over which `read` sums.

    One receipt at a time reads them, and takes them along when it ends.
    """

    counters: dict[tuple[int, str | None], Tensor] = field(default_factory=dict)
    lists: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(
        self, layer: int, device: torch.device, lists: int = 1, reason: str | None = None
    ) -> Tensor:
        """The counters (7,) int64 of a layer's calls with a reason, in memory that stays."""
        with self._lock:
            if (layer, reason) not in self.counters:
                made = self.counters[layer, reason] = new_counters(device)
                torch._dynamo.mark_static_address(made)
            if reason is None:
                self.lists[layer] = lists
            return self.counters[layer, reason]

    def read(self, clear: bool = False) -> dict[tuple[int, str | None], dict[str, int]]:
        """Calls, rows, tokens cached and read, and the most cached, by layer and reason; waits for
        the device.

        clear: they begin at 0 again.
        """
        with self._lock:
            numbers = {place: counters.tolist() for place, counters in self.counters.items()}
            if clear:
                for counters in self.counters.values():
                    counters[: len(COUNTED)].zero_()
        rows = {place: dict(zip(COUNTED, row, strict=False)) for place, row in numbers.items()}
        return {place: row for place, row in rows.items() if row["calls"]}

    def not_finite(self) -> list[int]:
        """Layers that had a NaN or infinite key or value."""
        return sorted(layer for (layer, _), own in self.counters.items() if own[NOT_FINITE])

    def verify(self) -> None:
        """UnsupportedModelError where a step over a static cache had a mask that it cannot read."""
        if any(own[SEVERAL] for own in self.counters.values()):
            raise UnsupportedModelError(
                "an attention mask left out tokens between others in a step over a static cache, "
                "which reads one span of tokens: its outputs are wrong. Pad on the left, or use a "
                "dynamic cache"
            )

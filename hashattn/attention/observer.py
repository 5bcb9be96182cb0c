"""The one seam through which others see what the attention path does.

Receipts, benchmarks and all other listeners are told of every call of every layer, once, after the
call: nothing is selected a second time and nothing is patched. Durations are measured only while a
listener asks for them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hashattn.selectors.base import KeyView
from hashattn.selectors.plan import SelectionPlan


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One call of one attention layer: what it saw, what it read, how long that took.

    query (batch, heads, q, head_dim) as attention used it. n: tokens cached, this call's included.
    reason: why the call was dense, None if it was sparse; calls with "prefill" and "no_cache" begin
    a context. seen: tokens that the rows could attend to, summed over batch and rows: a number, or
    a tensor of one element where it lies on a GPU.
    Of a sparse call: indices (batch, lists, q, m) int32 of the tokens read, -1 for padding;
    log_weights, what was added to their logits, like indices, or None; plan, what the selector
    could choose from; view, the keys and the selector's index; values (batch, kv_heads, n, Dv);
    logits, keywords of `kernels.attend`: scaling, softcap and sinks. A dense call has view and
    logits too while somebody listens beside the receipt.
    levels (batch, lists, q) int64: with a fallback, how often each list was doubled, its number of
    levels for one that is dense; else None.
    counted: a kernel counted the step, for the receipt.
    seconds: of "encode", "select", "attend" and "total" if a listener is timed, else None; with a
    fallback also of "verify".
    The tensors are the model's own: a listener that keeps one must copy it.
    """

    layer: int
    query: Tensor
    n: int
    seen: int | float | Tensor
    reason: str | None = None
    indices: Tensor | None = None
    log_weights: Tensor | None = None
    plan: SelectionPlan | None = None
    view: KeyView | None = None
    values: Tensor | None = None
    logits: dict[str, Any] | None = None
    levels: Tensor | None = None
    counted: bool = False
    seconds: dict[str, float] | None = None

    @property
    def rows(self) -> int:
        """Query rows, batch x q."""
        return self.query.shape[0] * self.query.shape[2]


class Observer(Protocol):
    """A listener that is told of each LayerStep, see `Attachment.listen`.

    timed: whether it needs `seconds`; on a GPU every stage then waits for the device.
    """

    timed: bool

    def saw(self, step: LayerStep) -> None:
        """Called once for each call of each layer, in the thread that makes the call."""


class Clock:
    """Seconds of the stages of one call."""

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type == "cuda"
        self._begin = self._last = self._now()
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = self._now()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage, and "total" since the clock started."""
        return self._stages | {"total": self._now() - self._begin}

    def _now(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter()


class _NoClock:
    """Stands in for a Clock while no listener is timed."""

    def lap(self, stage: str) -> None:
        """Nothing is timed."""

    def seconds(self) -> None:
        """None: nothing was timed."""


NO_CLOCK = _NoClock()

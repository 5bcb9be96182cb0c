"""What the attention function knows of an attachment, and of one call of one layer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.attention.cache import IndexedLayer
from hashattn.attention.finite import FiniteWatch
from hashattn.attention.masks import make_plan
from hashattn.attention.observer import NO_CLOCK, Clock, LayerStep, Observer
from hashattn.attention.receipt import Receipt
from hashattn.models.families import adds_position_bias
from hashattn.models.heads import HeadSlice
from hashattn.selectors.base import Selector
from hashattn.selectors.plan import SelectionPlan

NAME = "hash_attention"  # of the attention function, for transformers
CALL = "hashattn_call"  # keyword that carries a LayerCall from the module hook to that function


@dataclass
class SparseRun:
    """An attachment: the method, its limits, and who is told of its steps.

    heads: what this process holds of the model, None for all; selector: the method for these.
    observers: who listens beside the receipt. Threads may share a run: what belongs to a step is
    kept for each thread.
    """

    selector: Selector
    budget: Budget
    sparse_rows: int
    dense_layers: frozenset[int]
    full_layers: frozenset[int]
    eager: bool
    heads: HeadSlice | None
    receipt: Receipt
    observers: tuple[Observer, ...] = ()
    finite: FiniteWatch = field(default_factory=FiniteWatch)
    _own: threading.local = field(default_factory=threading.local, repr=False)

    def plan(self, mask: Tensor | None, query: Tensor, n: int) -> SelectionPlan:
        """make_plan of a call; the layers of one step ask for the same."""
        batch, _, q_len, _ = query.shape
        call = (mask, batch, q_len, n, query.device)
        last = getattr(self._own, "plan", None)
        if last is None or not _same(last[0], call):
            last = self._own.plan = call, make_plan(*call, self.budget)
        return last[1]

    def clock(self, device: torch.device) -> Any:
        """A Clock if a listener wants durations."""
        return Clock(device) if any(each.timed for each in self.observers) else NO_CLOCK

    def tell(self, step: LayerStep) -> None:
        """Tell the receipt and all listeners."""
        self.receipt.saw(step)
        for observer in self.observers:
            observer.saw(step)


def _same(one: tuple, other: tuple) -> bool:
    """Equal calls: the very same mask, and equal numbers."""
    return one[0] is other[0] and one[1:] == other[1:]


@dataclass(frozen=True)
class LayerCall:
    """One call of one attention module; cache_layer is None where nothing can be indexed.

    in_prompt: the call reads a part of a prompt whose beginning started the cache.
    """

    run: SparseRun
    layer: int
    cache_layer: IndexedLayer | None
    has_cache: bool
    in_prompt: bool = False

    @property
    def indexed(self) -> bool:
        """Whether this layer keeps a selector's index."""
        run = self.run
        return (
            self.cache_layer is not None
            and run.selector.sparse
            and self.layer in run.full_layers
            and self.layer not in run.dense_layers
        )

    def tokens_cached(self, key: Tensor) -> int:
        """Tokens in the cache including this call's; a static buffer is longer than that."""
        if self.cache_layer is None:
            return key.shape[2]
        return min(key.shape[2], int(self.cache_layer.get_seq_length()))

    def dense_reason(
        self, q_len: int, n: int, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call of q_len rows over n cached tokens is dense; None for a sparse one.

        "prefill" is a call that begins a cache, or goes on with the prompt that did. What else
        follows cached tokens is a step, however many rows it has: a second turn, or drafts to
        verify.
        """
        run = self.run
        few = q_len <= run.sparse_rows
        if not self.has_cache:
            return "no_cache"
        if n == q_len or (self.in_prompt and not few):
            return "prefill"
        if not run.selector.sparse:
            return "dense_selector"
        if self.layer not in run.full_layers:
            return "sliding_window"
        if self.layer in run.dense_layers:
            return "dense_layer"
        if self.cache_layer is None:
            return "unsupported_cache"
        if not few:
            return "several_rows"
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            return "unsupported_mask"
        return "position_bias" if adds_position_bias(kwargs) else None


@dataclass(frozen=True)
class DetachedCall:
    """A call of a copy of an attached model, which is dense as the model was before."""

    eager: bool

"""What the attention function knows of an attachment and of one call of a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hashattn.attention.break_even import BreakEven
from hashattn.attention.budget import Budget
from hashattn.attention.cache import IndexedLayer
from hashattn.attention.device_counts import DeviceCounts
from hashattn.attention.fallback import Fallback
from hashattn.attention.finite import FiniteWatch
from hashattn.attention.masks import make_plan
from hashattn.attention.memory import LayerMemory
from hashattn.attention.observer import NO_CLOCK, Clock, LayerStep, Observer
from hashattn.attention.passages import Passages
from hashattn.attention.receipt import Receipt
from hashattn.attention.stored import StoredLayer
from hashattn.models.families import adds_position_bias
from hashattn.models.heads import HeadSlice
from hashattn.selectors.base import Selector
from hashattn.selectors.plan import SelectionPlan

NAME = "hash_attention"  # of the attention function, for transformers
CALL = "hashattn_call"  # keyword that carries a LayerCall from the module hook to that function


@dataclass
class SparseRun:
    """An attachment: the method, its limits, and the listeners of its steps.

    heads: those that this process holds, None for all; selector and fallback: for these.
    dense_below: cached tokens under which a call is dense; break_even: what was measured for that.
    storage: where the rows of layers that can be sparse lie, None for fast memory. kept: what every
    step reads beside what is selected.
    observers: listeners beside the receipt. counts: what kernels count, for the receipt. static: by
    layer, an attention.static.LayerSteps; memory: what their launches share.
    Threads may share a run: the plan of a step is kept per thread.
    """

    selector: Selector
    budget: Budget
    sparse_rows: int
    dense_layers: frozenset[int]
    full_layers: frozenset[int]
    eager: bool
    heads: HeadSlice | None
    receipt: Receipt
    fallback: Fallback | None = None
    dense_below: float = 0
    break_even: BreakEven | None = None
    storage: LayerMemory | None = None
    kept: Passages | None = None
    observers: tuple[Observer, ...] = ()
    finite: FiniteWatch = field(default_factory=FiniteWatch)
    counts: DeviceCounts = field(default_factory=DeviceCounts)
    static: dict[int, Any] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    _thread: threading.local = field(default_factory=threading.local, repr=False)

    def plan(self, mask: Tensor | None, query: Tensor, n: int) -> SelectionPlan:
        """make_plan of a call with query (batch, heads, q, head_dim) over n cached tokens.

        All layers of a step need the same one, so the last is kept.
        """
        batch, _, q_len, _ = query.shape
        call = (mask, batch, q_len, n, query.device)
        last_call, plan = getattr(self._thread, "planned", (None, None))
        if plan is None or not _same(last_call, call):
            plan = make_plan(*call, self.budget)
            self._thread.planned = call, plan
        return plan

    def once(self, mask: Tensor, layer: int, make: Callable[[], Any]) -> Any:
        """What `make` makes for a step with this mask, made once for all its layers, which come in
        order: an earlier layer begins another step, even if it has the same tensor for a mask."""
        last_mask, last, made = getattr(self._thread, "made", (None, layer, None))
        if last_mask is not mask or layer <= last:
            made = make()
        self._thread.made = mask, layer, made
        return made

    def with_kept(
        self, indices: Tensor, log_weights: Tensor | None, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Selected tokens and their log weights with the kept tokens, if there are any
        (Passages.merge)."""
        if self.kept is None:
            return indices, log_weights
        return self.kept.merge(indices, log_weights, plan)

    def stores(self, layer: int) -> bool:
        """Whether `storage` says where a layer's rows lie: one that can be sparse, as every step of
        another reads all of them."""
        full = self.selector.sparse and layer in self.full_layers
        return self.storage is not None and full and layer not in self.dense_layers

    def clock(self, device: torch.device) -> Any:
        """A Clock if a listener is timed, else one that measures nothing."""
        return Clock(device) if any(observer.timed for observer in self.observers) else NO_CLOCK

    def begin_receipt(self, receipt: Receipt) -> None:
        """Let another receipt count from now on."""
        receipt.follow(self.counts, self.receipt)
        if self.kept is not None:
            receipt.keeps(self.kept.most)
        self.receipt = receipt

    def tell(self, step: LayerStep) -> None:
        """Tell the receipt and all listeners."""
        if not step.counted:
            self.receipt.saw(step)
        for observer in self.observers:
            observer.saw(step)


def _same(call: tuple, other: tuple) -> bool:
    """Equal calls: the same mask object, and equal numbers."""
    return call[0] is other[0] and call[1:] == other[1:]


@dataclass(frozen=True)
class LayerCall:
    """One call of one attention module; cache_layer is None where nothing can be indexed.

    in_prompt: the call reads a part of the prompt that began the cache. current: the cache layer
    had an index of all its tokens before this call. static: the cache is static; continues: and its
    prompt was read, so that a call of one row is a step.
    """

    run: SparseRun
    layer: int
    cache_layer: IndexedLayer | None
    has_cache: bool
    in_prompt: bool = False
    current: bool = False
    static: bool = False
    continues: bool = False

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

    @property
    def stored(self) -> bool:
        """Whether this layer's rows do not all lie in fast memory as they were computed."""
        return isinstance(self.cache_layer, StoredLayer)

    @property
    def reads_all(self) -> bool:
        """Whether a sparse call looks at all keys, not at its index alone: its method does, or a
        listener may."""
        return bool(self.run.observers) or self.run.selector.reads_keys

    def needs_index(self, n: int) -> bool:
        """Whether a dense call with n cached tokens has to bring the index up to date.

        While a context is too short to be read sparsely nobody reads the index, and the first call
        that does encodes (and checks) all that it lacks, in one go: a context that stays short
        costs what it costs the model. Listeners and methods that observe read it before; a static
        cache's has to be there when a compiled step, which cannot encode a prompt, becomes sparse;
        and keys that are stored in fewer bits are encoded before.
        """
        run = self.run
        read = self.static or bool(run.observers) or run.selector.observes
        return read or self.stored or n >= run.dense_below

    def tokens_cached(self, key: Tensor) -> int:
        """Tokens in the cache, this call's included; key (batch, kv_heads, room, head_dim) may have
        room for more."""
        if self.cache_layer is None:
            return key.shape[2]
        if self.stored:
            return self.cache_layer.get_seq_length()
        return min(key.shape[2], int(self.cache_layer.get_seq_length()))

    @property
    def always_dense(self) -> str | None:
        """Why every step of this layer is dense; None where that depends on the call."""
        if not self.run.selector.sparse:
            return "dense_selector"
        if self.layer not in self.run.full_layers:
            return "sliding_window"
        return "dense_layer" if self.layer in self.run.dense_layers else None

    def dense_reason(
        self, q_len: int, n: int, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call of q_len rows over n cached tokens is dense; None for a sparse one.

        "prefill" is a call that begins a cache, or continues the prompt that began it. Any other
        call over cached tokens is a step, however many rows it has: a second turn, or drafted
        tokens to verify.
        """
        run = self.run
        few_rows = q_len <= run.sparse_rows
        if not self.has_cache:
            return "no_cache"
        if n == q_len or (self.in_prompt and not few_rows):
            return "prefill"
        if self.always_dense is not None:
            return self.always_dense
        if self.cache_layer is None:
            return "unsupported_cache"
        if not few_rows:
            return "several_rows"
        if n < run.dense_below:
            return "short_context"
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            return "unsupported_mask"
        return "position_bias" if adds_position_bias(kwargs) else None


@dataclass(frozen=True)
class DetachedCall:
    """A call of a copy of an attached model: dense, as the model was before."""

    eager: bool

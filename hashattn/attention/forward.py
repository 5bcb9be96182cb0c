"""The attention function registered with transformers: one call of one layer.

A call is sparse when it has few query rows and a cached context; every other call goes to
`dense_attention`, for a reason that the run's listeners, the receipt first of all, are told.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashattn.attention import refusals
from hashattn.attention.budget import Budget
from hashattn.attention.cache import IndexedLayer
from hashattn.attention.finite import FiniteWatch
from hashattn.attention.observer import NO_CLOCK, Clock, LayerStep, Observer
from hashattn.attention.receipt import Receipt
from hashattn.attention.tokens import make_plan
from hashattn.kernels import attend, dense_decode
from hashattn.models.dense import dense_attention, softmax_sinks
from hashattn.models.heads import HeadSlice
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.plan import SelectionPlan

NAME = "hash_attention"
CALL = "hashattn_call"  # keyword that carries a LayerCall from the module hook to `forward`


@dataclass
class SparseRun:
    """What the attention function needs to know of an attachment.

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


@dataclass(frozen=True)
class DetachedCall:
    """A call of a copy of an attached model, which is dense as the model was before."""

    eager: bool


@torch._dynamo.disable  # selection has data-dependent shapes and writes the receipt
def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature: query (batch, heads, q, head_dim), key and value the
    whole cache (batch, kv_heads, n, head_dim) -> output (batch, q, heads, head_dim), weights."""
    call = kwargs.pop(CALL, None)

    def dense(eager: bool) -> tuple[Tensor, Tensor | None]:
        return dense_attention(
            module, query, key, value, attention_mask,
            eager=eager, scaling=scaling, dropout=dropout, **kwargs,
        )  # fmt: skip

    if not isinstance(call, LayerCall):  # a module that attach did not find, or a model's copy
        return dense(eager=call is not None and call.eager)
    refusals.refuse_paged(kwargs)
    if call.run.heads is not None and call.indexed:
        refusals.refuse_other_heads(call.layer, call.run.heads, query, key)
    clock = call.run.clock(query.device)
    n = _tokens_cached(call, key)
    reason = _dense_reason(call, query.shape[2], n, attention_mask, kwargs)
    view = _view(call, query, key[:, :, :n], value[:, :, :n], sparse=reason is None)
    clock.lap("encode")
    logits = Logits(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("softcap"),
        softmax_sinks(module, kwargs),
    )
    if reason is None:
        refusals.refuse_training(module, query, kwargs)
        return _sparse(call, query, key, value, attention_mask, view, logits, clock), None
    if call.indexed and call.run.selector.observes:
        seen = replace(view, visible=_visible(attention_mask, n))
        _observe(call, query, seen, logits.scaling)
    out = _dense_step(call, query, key, value, attention_mask, n, reason, logits, dense)
    clock.lap("attend")
    call.run.tell(
        LayerStep(call.layer, query, n, _seen(query, attention_mask, n), reason,
                  seconds=clock.seconds())
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Logits:
    """What becomes of q.k before the softmax: times scaling, capped, beside learned sinks."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None


def _sparse(
    call: LayerCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    view: KeyView,
    logits: Logits,
    clock: Any,
) -> Tensor:
    """Select, attend, tell: output (batch, q, heads, head_dim)."""
    run, kv_heads, n = call.run, key.shape[1], view.keys.shape[2]
    with torch.no_grad():
        shared = run.plan(mask, query, n)
        lists = run.selector.lists(query.shape[1], kv_heads)
        plan = run.budget.of_layer(shared, call.layer, kv_heads, lists, run.heads)
        if mask is not None:
            view = replace(view, visible=plan.seen[:, 0, -1])
        indices, log_weights = run.selector.sample(call.layer, query, view, logits.scaling, plan)
    clock.lap("select")
    # the whole buffer, not key[:, :, :n]: slicing a static cache would copy it on gathering
    out = attend(
        query, key, value, indices, logits.scaling,
        softcap=logits.softcap, sinks=logits.sinks, log_weights=log_weights,
    )  # fmt: skip
    clock.lap("attend")
    if run.selector.observes:
        _observe(call, query, view, logits.scaling, indices)
    shape = query.shape[1] // kv_heads, key.shape[3]
    run.receipt.auxiliary_bits = run.selector.auxiliary_bits(*shape)
    run.receipt.nominal_bits = run.selector.nominal_bits(*shape)
    run.tell(
        LayerStep(call.layer, query, n, shared.visible_total, None, indices, log_weights, plan,
                  view, clock.seconds())
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _dense_step(
    call: LayerCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    n: int,
    reason: str,
    logits: Logits,
    dense: Callable[[bool], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """A dense call, by our own kernel where that is faster and the rows see intervals of tokens.

    That is a decode step on a CPU, in a dense layer of a sparse run or by a dense selector that
    asks for it: torch's attention repeats K and V there, or walks them once per query head.
    """
    ours = reason == "dense_layer" or (reason == "dense_selector" and call.run.selector.kernel)
    one_row = query.shape[2] == 1 and query.is_cpu and not call.run.eager
    if ours and one_row and not torch.is_grad_enabled():
        plan = call.run.plan(mask, query, n)
        if plan.spans is not None:
            out = dense_decode(
                query, key, value, logits.scaling,
                spans=plan.spans, softcap=logits.softcap, sinks=logits.sinks,
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
    return dense(call.run.eager)


def _dense_reason(
    call: LayerCall, q_len: int, n: int, mask: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Why this call is dense, or None for a sparse one.

    "prefill" is a call that begins a cache, or goes on with the prompt that did. What else follows
    cached tokens is a step, however many rows it has: a second turn, or drafts to verify.
    """
    run = call.run
    few = q_len <= run.sparse_rows
    if not call.has_cache:
        return "no_cache"
    if n == q_len or (call.in_prompt and not few):
        return "prefill"
    if not run.selector.sparse:
        return "dense_selector"
    if call.layer not in run.full_layers:
        return "sliding_window"
    if call.layer in run.dense_layers:
        return "dense_layer"
    if call.cache_layer is None:
        return "unsupported_cache"
    if not few:
        return "several_rows"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return "unsupported_mask"
    return "position_bias" if kwargs.get("position_bias") is not None else None


def _tokens_cached(call: LayerCall, key: Tensor) -> int:
    """Tokens in the cache including this call's; a static buffer is longer than that."""
    if call.cache_layer is None:
        return key.shape[2]
    return min(key.shape[2], int(call.cache_layer.get_seq_length()))


@torch.no_grad()
def _view(call: LayerCall, query: Tensor, keys: Tensor, values: Tensor, sparse: bool) -> KeyView:
    """What the selector may look at, its index brought up to date.

    New keys are encoded on every call, prefill included, so that decoding only adds its own; those
    of a sparse call together with its queries.
    """
    if not call.indexed:
        return KeyView(keys=keys)
    layer, selector = call.cache_layer, call.run.selector
    if not layer.written:
        refusals.refuse_other_slot(call.layer)
    encoded_before = layer.index_length if layer.index_owner == selector.identity else 0
    call.run.finite.check(call.layer, keys, values, encoded_before)
    index, encoded = layer.sync_index(selector, call.layer, keys, values, query if sparse else None)
    if selector.observes:
        before = keys.shape[2] - query.shape[2]
        refusals.refuse_unobserved(selector, layer.observed_length, before)
    return KeyView(keys=keys, index=index, encoded=encoded)


@torch.no_grad()
def _observe(
    call: LayerCall, query: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
) -> None:
    selector = call.run.selector
    state = selector.observe(call.layer, query, view, scaling, read)
    call.cache_layer.keep_observed(selector, state)


def _seen(query: Tensor, mask: Tensor | None, n: int) -> float | Tensor:
    """Tokens that the rows of a dense call see, summed over batch and rows."""
    batch, _, q_len, _ = query.shape
    if mask is None:
        return batch * (q_len * n - q_len * (q_len - 1) / 2)
    visible = _as_bool(mask)[..., :n]
    return visible.sum() * (batch / visible.shape[0] / visible.shape[1])


def _visible(mask: Tensor | None, n: int) -> Tensor | None:
    """Tokens (batch, n) that the last row of transformers' mask sees; None where all are seen."""
    return None if mask is None else _as_bool(mask[:, 0, -1, :n])


def _as_bool(mask: Tensor) -> Tensor:
    """True where transformers' mask, boolean or added to the logits, lets attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask; arguments pass through, their names differ between releases."""
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Make NAME known to transformers: attention and mask, or left padding would be ignored."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, _mask)

"""The attention function registered with transformers: one call of one layer.

A call is sparse when it has few query rows and a cached context; every other call goes to
`dense_attention` and leaves its reason in the receipt.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..dense import dense_attention, softmax_sinks
from ..errors import AttachmentError, UnsupportedModelError
from ..heads import HeadSlice
from ..kernels import Codes, attend, dense_decode
from ..selectors.base import KeyView, Selector
from ..selectors.choice import Choice
from ..trust.receipt import Receipt
from .budget import Budget
from .cache import IndexedLayer
from .tokens import make_choice

NAME = "hash_attention"
CALL = "hashattn_call"  # keyword that carries a LayerCall from the module hook to `forward`


@dataclass
class SparseRun:
    """What the attention function needs to know of an attachment.

    heads: what this process holds of the model, None for all; selector: the method for these.
    """

    selector: Selector
    budget: Budget
    sparse_rows: int
    dense_layers: frozenset[int]
    full_layers: frozenset[int]
    eager: bool
    heads: HeadSlice | None
    receipt: Receipt
    _last: tuple[tuple, Choice] | None = field(default=None, repr=False)

    def choice(self, mask: Tensor | None, query: Tensor, n: int) -> Choice:
        """make_choice of a call; the layers of one step ask for the same."""
        batch, _, q_len, _ = query.shape
        asked = (mask, batch, q_len, n, query.device)
        if self._last is None or not _same(self._last[0], asked):
            self._last = asked, make_choice(*asked, self.budget)
        return self._last[1]


def _same(one: tuple, other: tuple) -> bool:
    """Equal calls: the very same mask, and equal numbers."""
    return one[0] is other[0] and one[1:] == other[1:]


@dataclass(frozen=True)
class LayerCall:
    """One call of one attention module; cache_layer is None where nothing can be indexed."""

    run: SparseRun
    layer: int
    cache_layer: IndexedLayer | None
    has_cache: bool


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
    if call is None:  # a module that attach did not find, e.g. an encoder of the same model
        return dense_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            eager=False,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
    _refuse_paged(kwargs)
    _refuse_other_heads(call, query, key)
    n = _tokens_cached(call, key)
    reason = _dense_reason(call, query.shape[2], n, attention_mask, kwargs)
    index, encoded = _sync(call, key[:, :, :n], value, query if reason is None else None)
    view = KeyView(keys=key[:, :, :n], index=index, encoded=encoded)
    if _observes(call):
        _refuse_unobserved(call, n - query.shape[2])
    if reason is None:
        _refuse_unsupported(module, query, kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _sparse(module, call, query, key, value, attention_mask, view, scaling, kwargs)
        return out.transpose(1, 2).contiguous(), None
    _record_dense(call, query, n, attention_mask, reason)
    if _observes(call):
        seen = replace(view, visible=_visible(attention_mask, n))
        _observe(call, query, seen, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if _walks(call, query, reason):
        choice = call.run.choice(attention_mask, query, n)
        if choice.spans is not None:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            extra = {"softcap": kwargs.get("softcap"), "sinks": softmax_sinks(module, kwargs)}
            out = dense_decode(query, key, value, scaling, spans=choice.spans, **extra)
            return out.transpose(1, 2).contiguous(), None
    return dense_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        eager=call.run.eager,
        scaling=scaling,
        dropout=dropout,
        **kwargs,
    )


def _sparse(
    module: nn.Module,
    call: LayerCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    view: KeyView,
    scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:
    run = call.run
    with torch.no_grad():
        kv_heads = key.shape[1]
        choice = run.choice(mask, query, view.keys.shape[2])
        lists = run.selector.lists(query.shape[1], kv_heads)
        choice = run.budget.of_layer(choice, call.layer, kv_heads, lists, run.heads)
        if mask is not None:
            view = replace(view, visible=choice.seen[:, 0, -1])
        indices, log_weights = run.selector.sample(call.layer, query, view, scaling, choice)
        _record_sparse(call, query, key, indices, choice)
    if run.selector.observes:
        _observe(call, query, view, scaling, indices)
    # the whole buffer, not key[:, :, :n]: slicing a static cache would copy it on gathering
    return attend(
        query,
        key,
        value,
        indices,
        scaling,
        softcap=kwargs.get("softcap"),
        sinks=softmax_sinks(module, kwargs),
        log_weights=log_weights,
    )


def _walks(call: LayerCall, query: Tensor, reason: str) -> bool:
    """Whether this dense call is a decode step of our own kernel: a dense layer of a sparse run, or
    a dense selector that asks for it.

    On a CPU torch's attention repeats K and V, or walks them once per query head, for one row.
    """
    asked = reason == "dense_layer" or (reason == "dense_selector" and call.run.selector.kernel)
    row = query.shape[2] == 1 and query.is_cpu and not call.run.eager
    return asked and row and not torch.is_grad_enabled()


def _tokens_cached(call: LayerCall, key: Tensor) -> int:
    """Tokens in the cache including this call's; a static buffer is longer than that."""
    if call.cache_layer is None:
        return key.shape[2]
    return min(key.shape[2], int(call.cache_layer.get_seq_length()))


def _eligible(call: LayerCall) -> bool:
    return (
        call.cache_layer is not None
        and call.run.selector.sparse
        and call.layer in call.run.full_layers
        and call.layer not in call.run.dense_layers
    )


def _sync(
    call: LayerCall, keys: Tensor, values: Tensor, queries: Tensor | None
) -> tuple[dict[str, Tensor | Codes], Tensor | None]:
    """Encode new keys on every call, prefill included, so that decoding only adds its own.

    queries: of a sparse call, whose codes are made with those of its keys.
    """
    if not _eligible(call):
        return {}, None
    with torch.no_grad():
        return call.cache_layer.sync_index(call.run.selector, call.layer, keys, values, queries)


def _observes(call: LayerCall) -> bool:
    return call.run.selector.observes and _eligible(call)


@torch.no_grad()
def _observe(
    call: LayerCall, query: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
) -> None:
    selector = call.run.selector
    state = selector.observe(call.layer, query, view, scaling, read)
    call.cache_layer.keep_observed(selector, state)


def _visible(mask: Tensor | None, n: int) -> Tensor | None:
    """Tokens (batch, n) that the last row of transformers' mask sees; None where all are seen."""
    return None if mask is None else _as_bool(mask[:, 0, -1, :n])


def _as_bool(mask: Tensor) -> Tensor:
    """True where transformers' mask, boolean or added to the logits, lets attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _dense_reason(
    call: LayerCall, q_len: int, n: int, mask: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Why this call is dense, or None for a sparse one."""
    run = call.run
    if not call.has_cache:
        return "no_cache"
    if q_len > run.sparse_rows or n == q_len:
        return "prefill"
    if not run.selector.sparse:
        return "dense_selector"
    if call.layer not in run.full_layers:
        return "sliding_window"
    if call.layer in run.dense_layers:
        return "dense_layer"
    if call.cache_layer is None:
        return "unsupported_cache"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return "unsupported_mask"
    return "position_bias" if kwargs.get("position_bias") is not None else None


def _record_sparse(
    call: LayerCall, query: Tensor, key: Tensor, indices: Tensor, choice: Choice
) -> None:
    receipt = call.run.receipt
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], key.shape[3]
    receipt.auxiliary_bits = call.run.selector.auxiliary_bits(heads // kv_heads, head_dim)
    receipt.nominal_bits = call.run.selector.nominal_bits(heads // kv_heads, head_dim)
    receipt.record_step(
        call.layer,
        rows=query.shape[0] * query.shape[2],
        cached=choice.visible.double().mean(),
        read=(indices >= 0).sum(dim=-1).double().mean(),
    )


def _record_dense(call: LayerCall, query: Tensor, n: int, mask: Tensor | None, reason: str) -> None:
    receipt = call.run.receipt
    if reason in ("prefill", "no_cache"):
        receipt.record_call(reason)
        return
    if mask is not None:
        tokens = _as_bool(mask)[..., :n].sum(dim=-1).double().mean()
    else:
        tokens = n - (query.shape[2] - 1) / 2
    rows = query.shape[0] * query.shape[2]
    receipt.record_step(call.layer, rows=rows, cached=tokens, read=tokens, reason=reason)


def _refuse_unsupported(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> None:
    if module.training and query.requires_grad:
        raise UnsupportedModelError(
            "sparse attention does not train: selection has no gradient. Call model.eval(), or "
            "detach before training"
        )
    wanted = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if wanted:
        raise UnsupportedModelError(
            "output_attentions=True: sparse attention computes no full attention matrix. Leave "
            "it off, or detach to look at dense attention weights"
        )


def _refuse_other_heads(call: LayerCall, query: Tensor, key: Tensor) -> None:
    """A part of the heads is known by the model's plan: look whether they are as many as it says.

    Without tensor parallelism some families attend with other heads than their configuration has.
    """
    part = call.run.heads
    if part is None or not _eligible(call):
        return
    seen = query.shape[1], key.shape[1]
    if seen != (len(part.query), len(part.kv)):
        raise UnsupportedModelError(
            f"layer {call.layer} attends with {seen[0]} query heads and {seen[1]} KV heads on rank "
            f"{part.rank}, expected {len(part.query)} and {len(part.kv)}: tensor parallelism does "
            'not split this model by heads; load it with device_map="auto" instead'
        )


def _refuse_unobserved(call: LayerCall, before: int) -> None:
    seen = call.cache_layer.observed_length
    if seen != before:
        raise AttachmentError(
            f"selector {call.run.selector.name!r} decides from the attention it saw, but of the "
            f"{before} tokens cached before this call it saw {seen}: attach it before the prompt "
            "is prefilled, and keep it attached"
        )


def _refuse_paged(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None or kwargs.get("block_table") is not None:
        raise UnsupportedModelError(
            "continuous batching (paged caches) is not supported: use model.generate, or detach "
            "before model.generate_batch"
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask; arguments pass through, their names differ between releases."""
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Make NAME known to transformers: attention and mask, or left padding would be ignored."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, _mask)

"""The attention function registered with transformers: one call of one layer.

A call is sparse when it has few query rows and a cached context; every other call goes to
`dense_attention` and leaves its reason in the receipt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..dense import dense_attention, softmax_sinks
from ..errors import UnsupportedModelError
from ..kernels import attend, select
from ..selectors.base import KeyView, Selector
from ..trust.receipt import Receipt
from .budget import Budget
from .cache import IndexedLayer
from .tokens import token_sets, visible_tokens

NAME = "hash_attention"
CALL = "hashattn_call"  # keyword that carries a LayerCall from the module hook to `forward`


@dataclass
class SparseRun:
    """What the attention function needs to know of an attachment."""

    selector: Selector
    budget: Budget
    sparse_rows: int
    dense_layers: frozenset[int]
    full_layers: frozenset[int]
    eager: bool
    receipt: Receipt


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
    n = _tokens_cached(call, key)
    index = _sync(call, key[:, :, :n])
    reason = _dense_reason(call, query.shape[2], n, attention_mask, kwargs)
    if reason is None:
        _refuse_unsupported(module, query, kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _sparse(module, call, query, key, value, attention_mask, n, index, scaling, kwargs)
        return out.transpose(1, 2).contiguous(), None
    _record_dense(call, query, n, attention_mask, reason)
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
    n: int,
    index: dict[str, Tensor],
    scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:
    run = call.run
    with torch.no_grad():
        visible = visible_tokens(mask, query.shape[2], n, query.device)
        padding = None if mask is None else visible[:, 0, -1]
        view = KeyView(keys=key[:, :, :n], index=index, visible=padding)
        scores = run.selector.scores(call.layer, query, view, scaling)
        _check_scores(run.selector, scores, query, key, n)
        sets = token_sets(visible, run.budget)
        heavy = sets.heavy.expand(query.shape[0], -1)
        indices = select(scores, heavy, sets.candidates, sets.always)
        _record_sparse(call, query, key, indices, sets.visible)
    # the whole buffer, not key[:, :, :n]: slicing a static cache would copy it on gathering
    return attend(
        query,
        key,
        value,
        indices,
        scaling,
        softcap=kwargs.get("softcap"),
        sinks=softmax_sinks(module, kwargs),
    )


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


def _sync(call: LayerCall, keys: Tensor) -> dict[str, Tensor]:
    """Encode new keys on every call, prefill included, so that decoding only adds its own."""
    if not _eligible(call):
        return {}
    with torch.no_grad():
        return call.cache_layer.sync_index(call.run.selector, call.layer, keys)


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
    call: LayerCall, query: Tensor, key: Tensor, indices: Tensor, visible: Tensor
) -> None:
    receipt = call.run.receipt
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], key.shape[3]
    receipt.auxiliary_bits = call.run.selector.auxiliary_bits(heads // kv_heads, head_dim)
    receipt.record_step(
        call.layer,
        rows=query.shape[0] * query.shape[2],
        cached=visible.double().mean().item(),
        read=(indices >= 0).sum(dim=-1).double().mean().item(),
    )


def _record_dense(call: LayerCall, query: Tensor, n: int, mask: Tensor | None, reason: str) -> None:
    receipt = call.run.receipt
    if reason in ("prefill", "no_cache"):
        receipt.record_call(reason)
        return
    seen = visible_tokens(mask, query.shape[2], n, query.device)
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    tokens = seen.sum(dim=-1).double().mean().item()
    rows = query.shape[0] * query.shape[2]
    receipt.record_step(call.layer, rows=rows, cached=tokens, read=tokens, reason=reason)


def _check_scores(selector: Selector, scores: Tensor, query: Tensor, key: Tensor, n: int) -> None:
    batch, heads, q_len, _ = query.shape
    expected = (batch, selector.lists(heads, key.shape[1]), q_len, n)
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"selector {selector.name!r} (layout {selector.layout!r}): scores have shape "
            f"{tuple(scores.shape)}, expected (batch, lists, q, n) = {expected}"
        )


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

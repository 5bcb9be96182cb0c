"""Exact or estimated attention logits as scores: per query head, or one ranking for a group."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.base.layout import Layout
from hashattn.selectors.base import KeyView


def inner_products(queries: Tensor, keys: Tensor) -> Tensor:
    """q . k, float32 (B, heads, q, n), of queries (B, heads, q, D) and keys (B, KV heads, n, D)."""
    batch, heads, q_len, dim = queries.shape
    grouped = queries.float().reshape(batch, keys.shape[1], -1, dim)
    return (grouped @ keys.float().mT).reshape(batch, heads, q_len, -1)


def listed_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """q . k of listed tokens, float32 (B, lists, q, r, m), r query heads a list.

    queries (B, heads, q, D); keys (B, lists, q, m, D) of the tokens, as `kernels.gather_tokens`
    gives them.
    """
    batch, heads, q_len, dim = queries.shape
    lists = keys.shape[1]
    grouped = queries.float().reshape(batch, lists, heads // lists, q_len, dim).transpose(2, 3)
    return grouped @ keys.float().mT


def value_norms(view: KeyView) -> Tensor:
    """Norms of the tokens' values from the view's index, float32 (B, KV heads, 1, n).

    ValueError if they are not there.
    """
    if "value_norms" not in view.index:
        raise ValueError(
            "value_norms=True needs the norms of the cached values in the index: encode the values "
            "too (Selector.encode_values), or capture them (capture(values=True))"
        )
    return view.index["value_norms"].float().mT


def _attention_weights(logits: Tensor, view: KeyView) -> Tensor:
    """Softmax of logits (B, heads, q, n), of this shape, over the tokens that each row may see."""
    # the lowest finite value, not -inf: a row of padding sees nothing and would become NaN
    hidden = ~view.causal(logits.shape[2])
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)


def _group_weights(logits: Tensor, view: KeyView) -> Tensor:
    """Attention weights of logits (B, heads, q, n), summed over each group: (B, KV heads, q, n)."""
    groups = (view.keys.shape[1], -1)
    return _attention_weights(logits, view).unflatten(1, groups).sum(dim=2)


def scores_by_layout(logits: Tensor, layout: Layout, view: KeyView) -> Tensor:
    """Scores (B, lists, q, n): the logits (B, heads, q, n) themselves, or `_group_weights`."""
    return logits if layout == "per_query_head" else _group_weights(logits, view)

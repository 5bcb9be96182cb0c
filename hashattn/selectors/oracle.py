"""Oracle top-k: ranks tokens by their exact attention, the bound of every selector."""

from typing import Any

import torch
from torch import Tensor

from .base import KeyView, Layout, Selector


class OracleSelector(Selector):
    """Exact inner products q . k (layout "query_head"), or the attention weight summed over the
    query heads of a group (layout "kv_head")."""

    name = "oracle"

    def __init__(self, layout: Layout = "query_head") -> None:
        if layout not in ("query_head", "kv_head"):
            raise ValueError(f"layout={layout!r}: choose 'query_head' or 'kv_head'")
        self.layout = layout

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """(batch, lists, q, n) float32, monotone in the attention weight of each list."""
        batch, heads, q_len, dim = queries.shape
        kv_heads, n = view.keys.shape[1:3]
        grouped = queries.float().reshape(batch, kv_heads, -1, dim)
        logits = grouped @ view.keys.float().transpose(-1, -2) * scaling
        if self.layout == "query_head":
            return logits.reshape(batch, heads, q_len, n)
        logits = logits.reshape(batch, kv_heads, heads // kv_heads, q_len, n)
        hidden = ~view.causal(q_len)[:, :, None]
        # the lowest finite value, not -inf: a row of padding sees nothing and would become NaN
        weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return weights.sum(dim=2)

    def read_bits(self, group: int, head_dim: int) -> float:
        """All of K, at 16 bits a channel."""
        return 16.0 * head_dim

    def record(self) -> dict[str, Any]:
        """Name and layout."""
        return super().record() | {"parameters": {"layout": self.layout}}

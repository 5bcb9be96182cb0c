"""Oracle top-k: ranks tokens by their exact attention, the bound of every selector."""

from typing import Any

from torch import Tensor

from .base import KeyView, Layout, Selector
from .logits import check_layout, inner_products, scores_by_layout


class OracleSelector(Selector):
    """Exact inner products q . k (layout "query_head"), or the attention weight summed over the
    query heads of a group (layout "kv_head")."""

    name = "oracle"

    def __init__(self, layout: Layout = "query_head") -> None:
        check_layout(layout)
        self.layout = layout

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """(batch, lists, q, n) float32, monotone in the attention weight of each list."""
        logits = inner_products(queries, view.keys) * scaling
        return scores_by_layout(logits, self.layout, view)

    def read_bits(self, group: int, head_dim: int) -> float:
        """All of K, at 16 bits a channel."""
        return 16.0 * head_dim

    def record(self) -> dict[str, Any]:
        """Name and layout."""
        return super().record() | {"parameters": {"layout": self.layout}}

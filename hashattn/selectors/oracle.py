"""Oracle top-k: ranks tokens by their exact attention, the bound of every selector."""

from dataclasses import dataclass

from torch import Tensor

from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import NORM_BITS, KeyView, Selector
from hashattn.selectors.logits import inner_products, scores_by_layout, value_norms
from hashattn.selectors.usual import MethodStyle


@dataclass(frozen=True, eq=False)
class OracleSelector(Selector):
    """Exact inner products q . k (layout "per_query_head"), or the attention weight summed over the
    query heads of a group (layout "per_kv_head").

    value_norms: attention weights times the norms of the tokens' values (HashAttention, Lemma 4.1).
    """

    name = "oracle"
    style = MethodStyle("#7f7f7f", "*", "oracle top-k")

    layout: Layout = "per_query_head"
    value_norms: bool = False

    def __post_init__(self) -> None:
        check_layout(self.layout)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Float32 (B, lists, q, n), for each list monotone in the attention weight."""
        logits = inner_products(queries, view.keys) * scaling
        scores = scores_by_layout(logits, self.layout, view)
        if not self.value_norms:
            return scores
        norms = value_norms(view)
        if self.layout == "per_kv_head":
            return scores * norms
        return scores + norms.log().repeat_interleave(queries.shape[1] // norms.shape[1], dim=1)

    @property
    def sums_weights(self) -> bool:
        """Where a group shares a list."""
        return self.layout == "per_kv_head"

    def estimates_logits(self, layer: int) -> bool:
        """True: scores are the logits."""
        return True

    def estimates(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """The logits themselves (B, lists, q, n), or the logarithm of a group's weights."""
        return self.even_scores(layer, queries, view, scaling)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """Nothing, or a value norm."""
        return float(NORM_BITS * self.value_norms)

    def read_bits(self, group: int, head_dim: int) -> float:
        """All of K, at 16 bits a channel."""
        return 16.0 * head_dim

"""SparQ (Ribar et al. 2023): rank tokens by the query's largest channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.logits import inner_products, scores_by_layout
from hashattn.selectors.usual import MethodStyle

KEY_BITS = 16  # a channel of a cached key


@dataclass(frozen=True, eq=False)
class SparQSelector(Selector):
    """logit(token) = q_C.k_C / sqrt(D c), C the `channels` largest |q|, c = |q_C|_1 / |q|_1.

    The temperature makes up for the channels left out (SparQ, algorithm 1); where a model scales
    its logits by s instead of 1 / sqrt(D), it is s / sqrt(c). layout "per_kv_head" (the paper's
    rule for grouped queries): a group shares the channels with the largest sum of |q| and one
    selection, by the sum of its approximate softmax weights over the tokens each row sees.
    "per_query_head": channels and a selection for each query head. The paper's mean-value
    correction, which adds the average value for the attention that is not read, belongs to the
    output and not to the ranking: it is left out.
    """

    name = "sparq"
    style = MethodStyle("#44aa99", (3, 1, 0), "SparQ")

    channels: int = 32
    layout: Layout = "per_kv_head"

    def __post_init__(self) -> None:
        require(self.channels >= 1, "channels", self.channels, "at least 1")
        check_layout(self.layout)

    @property
    def sums_weights(self) -> bool:
        """Where a group shares a list."""
        return self.layout == "per_kv_head"

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Approximate logits, or a group's weights, float32 (B, lists, q, n).

        Raises ValueError for more channels than the head dimension.
        """
        queries = queries.float()
        lists = self.lists(queries.shape[1], view.keys.shape[1])
        reduced = queries * self._largest(queries, lists)
        tiny = torch.finfo(queries.dtype).tiny  # a query of zeros scores zero, not NaN
        total = queries.abs().sum(dim=-1, keepdim=True).clamp(min=tiny)
        coverage = (reduced.abs().sum(dim=-1, keepdim=True) / total).clamp(min=tiny)
        logits = inner_products(reduced, view.keys) * scaling / coverage.sqrt()
        return scores_by_layout(logits, self.layout, view)

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """A second copy of K, stored channel by channel, which the paper keeps so that the reads of
        single channels are contiguous. It changes no score, and this package makes none."""
        return float(KEY_BITS * head_dim)

    def read_bits(self, group: int, head_dim: int) -> float:
        """`channels` of a key, 16 bits each; per query head at most, as a group's may overlap."""
        sets = group if self.layout == "per_query_head" else 1
        return float(KEY_BITS * min(sets * self.channels, head_dim))

    def _largest(self, queries: Tensor, lists: int) -> Tensor:
        """Bool mask of the largest channels, like queries (B, heads, q, D); ties to the lowest."""
        dim = queries.shape[-1]
        require(self.channels <= dim, "channels", self.channels, f"within 1..{dim}, the head_dim")
        magnitude = queries.abs().unflatten(1, (lists, -1)).sum(dim=2)
        order = magnitude.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(magnitude, dtype=torch.bool)
        mask.scatter_(-1, order[..., : self.channels], True)
        return mask.repeat_interleave(queries.shape[1] // lists, dim=1)

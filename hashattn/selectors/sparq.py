"""SparQ (Ribar et al. 2023): rank tokens by the query's largest channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.logits import check_layout, inner_products, scores_by_layout

KEY_BITS = 16  # a channel of a cached key


class SparQSelector(Selector):
    """logit(token) = q_C.k_C / sqrt(D c), C the `channels` largest |q|, c = |q_C|_1 / |q|_1.

    The temperature makes up for the channels left out (SparQ, algorithm 1); where a model scales
    its logits by s instead of 1 / sqrt(D), it is s / sqrt(c). layout "kv_head" (the paper's rule
    for grouped queries): a group shares the channels with the largest sum of |q| and one selection,
    by the sum of its approximate softmax weights over the tokens each row sees. "query_head":
    channels and a selection for each query head.
    The paper's mean-value correction, which adds the average value for the attention that is not
    read, belongs to the output and not to the ranking: it is left out.
    """

    name = "sparq"

    def __init__(self, channels: int = 32, layout: str = "kv_head") -> None:
        if channels < 1:
            raise ValueError(f"channels = {channels} must be at least 1")
        check_layout(layout)
        self.channels, self.layout = channels, layout

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Approximate logits, or a group's weights, float32 (B, lists, q, n).

        Raises ValueError for more channels than the head dimension.
        """
        queries = queries.float()
        lists = self.lists(queries.shape[1], view.keys.shape[1])
        reduced = queries * self._largest(queries, lists)
        tiny = torch.finfo(queries.dtype).tiny  # a query of zeros scores zero, not NaN
        whole = queries.abs().sum(dim=-1, keepdim=True).clamp(min=tiny)
        coverage = (reduced.abs().sum(dim=-1, keepdim=True) / whole).clamp(min=tiny)
        logits = inner_products(reduced, view.keys) * scaling / coverage.sqrt()
        return scores_by_layout(logits, self.layout, view)

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """A second copy of K, stored channel by channel, which the paper keeps so that the reads of
        single channels are contiguous. It changes no score, and this package makes none."""
        return float(KEY_BITS * head_dim)

    def read_bits(self, group: int, head_dim: int) -> float:
        """`channels` of a key, 16 bits each; per query head at most, as a group's may overlap."""
        sets = group if self.layout == "query_head" else 1
        return float(KEY_BITS * min(sets * self.channels, head_dim))

    def record(self) -> dict[str, Any]:
        """Method and parameters; SparQ has no weights."""
        parameters = {"channels": self.channels, "layout": self.layout}
        return {"name": self.name, "parameters": parameters, "weights_sha256": None}

    def _largest(self, queries: Tensor, lists: int) -> Tensor:
        """Which channels count, like queries (B, heads, q, D), bool; ties to the lowest channel."""
        dim = queries.shape[-1]
        if self.channels > dim:
            raise ValueError(f"channels = {self.channels} must lie within 1..{dim}, the head_dim")
        magnitude = queries.abs().unflatten(1, (lists, -1)).sum(dim=2)
        order = magnitude.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(magnitude, dtype=torch.bool)
        chosen.scatter_(-1, order[..., : self.channels], True)
        return chosen.repeat_interleave(queries.shape[1] // lists, dim=1)

"""SOCKET (Joshi et al. 2026): soft collisions of a query with the hash buckets of the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import NORM_BITS, KeyView, Selector
from hashattn.selectors.hyperplanes import Hyperplanes
from hashattn.selectors.logits import value_norms
from hashattn.selectors.usual import MethodStyle

_MOST_HYPERPLANES = 15  # bucket ids of a table fit int16
OFFICIAL = {"tables": 60, "hyperplanes": 12}  # 720 bits; the defaults are 128
TOKENS_AT_ONCE = 4096  # bounds the float projections while a long prefill is encoded


@dataclass(frozen=True, eq=False)
class SocketSelector(Selector):
    """score = sum_l P_l(bucket_l(k)), over `tables` tables of `hyperplanes` hyperplanes w each.

    A key falls into one of a table's 2**hyperplanes buckets, by the signs of w.k. A query spreads
    over all of them: P_l is the softmax of h.c / temperature over the corners c of {-1, 1}^K, with
    h = tanh(w.q) / sqrt(D) (arXiv 2602.06283). Hyperplanes are N(0, 1), one set a layer shared by
    its heads, fixed by seed and layer on every device. OFFICIAL holds the authors' sizes.

    value_norms: multiply by the norm of the token's value, as the paper does; off by default, for
    its 16 bits. layout "per_query_head" (official) selects per query head, "per_kv_head" sums a
    group's scores and selects once.
    """

    name = "socket"
    style = MethodStyle("#88ccee", (3, 1, 180), "SOCKET")

    tables: int = 16
    hyperplanes: int = 8
    temperature: float = 0.3
    seed: int = 0
    layout: Layout = "per_query_head"
    value_norms: bool = False

    def __post_init__(self) -> None:
        planes, most = self.hyperplanes, _MOST_HYPERPLANES
        require(self.tables >= 1, "tables", self.tables, "at least 1")
        require(1 <= planes <= most, "hyperplanes", planes, f"within 1..{most}")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        check_layout(self.layout)
        self._settle(_planes=Hyperplanes(self.seed))

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"buckets": (B, KV heads, n, tables)} of keys (B, KV heads, n, D), an id per table.

        uint8 up to 8 hyperplanes, int16 above. Hyperplane i of a table adds 2**i to the id.
        """
        dtype = torch.uint8 if self._bucket_bits == 8 else torch.int16
        weights = 2 ** torch.arange(self.hyperplanes, device=keys.device)
        parts = [
            ((self._project(layer, part) > 0) * weights).sum(dim=-1).to(dtype)
            for part in keys.split(TOKENS_AT_ONCE, dim=2)
        ]
        return {"buckets": torch.cat(parts, dim=2)}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Expected collisions, float32 (B, lists, q, n), times the value norms if `value_norms`."""
        batch, heads, rows, dim = queries.shape
        buckets = view.index["buckets"]
        kv_heads, n = buckets.shape[1:3]
        pull = self._project(layer, queries).tanh() / (dim**0.5 * self.temperature)
        corners = self._corners(queries.device)
        # a group's query heads and rows are all rows of its KV head: (B, KV heads, rows, tables, K)
        pull = pull.reshape(batch, kv_heads, -1, self.tables, self.hyperplanes)
        collisions = pull.new_zeros(batch, kv_heads, pull.shape[2], n)
        for table in range(self.tables):  # one at a time: 2**K probabilities a row
            probabilities = (pull[:, :, :, table] @ corners).softmax(dim=-1)
            bucket = buckets[..., table].long()[:, :, None]
            collisions += probabilities.gather(-1, bucket.expand_as(collisions))
        if self.value_norms:
            collisions = collisions * value_norms(view)
        collisions = collisions.reshape(batch, heads, rows, n)
        if self.layout == "per_kv_head":
            collisions = collisions.unflatten(1, (kv_heads, -1)).sum(dim=2)
        return collisions

    @property
    def _bucket_bits(self) -> int:
        return 8 if self.hyperplanes <= 8 else 16

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """A bucket id for each table, in whole bytes, and 16 for a value norm."""
        return float(self.tables * self._bucket_bits + NORM_BITS * self.value_norms)

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """A bit per hyperplane and table, and 16 for a value norm."""
        return float(self.tables * self.hyperplanes + NORM_BITS * self.value_norms)

    def _project(self, layer: int, x: Tensor) -> Tensor:
        """w.x of x (B, H, n, D) for every hyperplane: (B, H, n, tables, hyperplanes) float32."""
        planes = self._planes(layer, (x.shape[-1], self.tables * self.hyperplanes), x.device)
        return (x.float() @ planes).unflatten(-1, (self.tables, self.hyperplanes))

    def _corners(self, device: torch.device) -> Tensor:
        """Signs (hyperplanes, 2**hyperplanes) float32 of the buckets, in the order of their ids."""
        buckets = torch.arange(2**self.hyperplanes, device=device)
        planes = torch.arange(self.hyperplanes, device=device)
        return ((buckets >> planes[:, None]) & 1) * 2.0 - 1.0

"""PQCache (Zhang et al. 2024): rank tokens by product-quantised keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.kernels import GrowableBuffer
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.logits import scores_by_layout
from hashattn.selectors.usual import MethodStyle

TOKENS_AT_ONCE = 1024  # bounds the distances (B, KV heads, parts, tokens, 2**bits) while encoding


@dataclass(frozen=True, eq=False)
class PQCacheSelector(Selector):
    """logit(token) = sum_j q_j.c_j[code_j], q and k cut into `parts` sub-vectors, j = 1..parts.

    k-means finds 2**bits centroids c_j for every sequence, layer and KV head among the keys of that
    cache's prefill after the first `sink`, and later keys take the code of their nearest centroid,
    as in the paper. It runs once, on the first sparse call and not within the prefill, so padding
    is known by then and chunks make no difference. Lloyd's algorithm, `iterations` steps, starts
    from evenly spaced tokens and needs no seed; a centroid that loses all its keys stays where it
    is. Centroids live in the cache beside the codes and survive its crops. Queries of a capture
    (view.positions) share the centroids of all its keys.
    layout "per_kv_head" (official) selects once per group, by the sum of its softmax weights of
    these logits, here over all tokens a row sees; "per_query_head" per query head.
    """

    name = "pqcache"
    style = MethodStyle("#aa4499", (8, 1, 0), "PQCache")

    parts: int = 2
    bits: int = 6
    iterations: int = 10
    sink: int = 4
    layout: Layout = "per_kv_head"

    def __post_init__(self) -> None:
        for field, least in (("parts", 1), ("iterations", 0), ("sink", 0)):
            value = getattr(self, field)
            require(value >= least, field, value, f"at least {least}")
        require(1 <= self.bits <= 8, "bits", self.bits, "within 1..8, a code is one byte")
        check_layout(self.layout)

    @property
    def sums_weights(self) -> bool:
        """Where a group shares a list."""
        return self.layout == "per_kv_head"

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": keys (B, KV heads, n, D)}: the store, which has the centroids, encodes them."""
        return {"codes": keys}

    def new_store(self, name: str, part: Tensor) -> ProductCodes:
        """Codes without centroids yet, for keys (B, KV heads, new, D)."""
        return ProductCodes(self.parts, self.bits)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Approximate logits, or a group's weights, float32 (B, lists, q, n).

        Raises ValueError where the head dimension is no multiple of `parts`.
        """
        codes = view.index["codes"]
        if not isinstance(codes, ProductCodes):  # the keys, where no cache has stored them
            codes = self.new_store("codes", codes)
        if codes.centroids is None:
            new = 0 if view.positions is not None else queries.shape[2]
            end = max(view.keys.shape[2] - new, 1)
            codes.fit(view.keys, _members(view, end, self.sink), self.iterations)
        return scores_by_layout(codes.inner_products(queries) * scaling, self.layout, view)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """A byte for each part's code. The centroids are not counted: 2**bits head_dim numbers per
        KV head, whatever the cache's length."""
        return 8.0 * self.parts

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """parts codes of `bits`, without the bytes' unused ones."""
        return float(self.parts * self.bits)


class ProductCodes:
    """Codes of cached keys, uint8 (B, KV heads, n, parts), and the centroids they stand for.

    centroids: float32 (B, KV heads, parts, 2**bits, D / parts), None before `fit`, which encodes
    all keys: those appended before it are not kept.
    """

    def __init__(self, parts: int, bits: int) -> None:
        self._codes = GrowableBuffer(axis=2)
        self.parts, self.count = parts, 2**bits
        self.centroids: Tensor | None = None

    @property
    def value(self) -> ProductCodes:
        """Itself: a selector needs the centroids with the codes."""
        return self

    @property
    def codes(self) -> Tensor:
        """uint8 (B, KV heads, n, parts)."""
        return self._codes.value

    def append(self, keys: Tensor) -> None:
        """Store the codes of keys (B, KV heads, new, D), once there are centroids."""
        if self.centroids is not None:
            for points in self._cut(keys).split(TOKENS_AT_ONCE, dim=3):
                codes = nearest(points, self.centroids).transpose(2, 3)
                self._codes.append(codes.to(torch.uint8))

    def crop(self, length: int) -> None:
        """Drop the codes after the first `length`; the centroids stay."""
        self._codes.crop(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or pick the batch of codes and centroids."""
        self._codes.map(change)
        if self.centroids is not None:
            self.centroids = change(self.centroids)

    def fit(self, keys: Tensor, members: Tensor, iterations: int) -> None:
        """Find the centroids of the members (B, up to n) bool among the first of keys (B, KV heads,
        n, D), and store the codes of all keys."""
        points = self._cut(keys[:, :, : members.shape[1]])
        self.centroids = _kmeans(points, members, self.count, iterations)
        self.append(keys)

    def inner_products(self, queries: Tensor) -> Tensor:
        """Queries (B, heads, q, D) times the quantised keys: float32 (B, heads, q, n)."""
        batch, heads, q_len, dim = queries.shape
        kv_heads = self.centroids.shape[1]
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads * q_len, dim)
        tables = self._cut(grouped) @ self.centroids.mT  # (B, KV heads, parts, rows, 2**bits)
        total = 0
        for table, code in zip(tables.unbind(2), self.codes.long().unbind(-1), strict=True):
            total = total + table.gather(-1, code[:, :, None].expand(*table.shape[:3], -1))
        return total.reshape(batch, heads, q_len, -1)

    def _cut(self, x: Tensor) -> Tensor:
        """x (B, H, n, D) as sub-vectors, float32 (B, H, parts, n, D / parts)."""
        if x.shape[-1] % self.parts:
            raise ValueError(f"parts = {self.parts} must divide the head_dim {x.shape[-1]}")
        return x.float().unflatten(-1, (self.parts, -1)).transpose(2, 3)


def _members(view: KeyView, end: int, sink: int) -> Tensor:
    """The visible tokens before `end` that k-means clusters, (B, end) bool: all but the first
    `sink`, and the last of them in any case."""
    batch = view.keys.shape[0]
    visible = view.keys.new_ones(batch, end, dtype=torch.bool)
    if view.visible is not None:
        visible = view.visible[:, :end]
    first = (visible.sum(dim=-1, keepdim=True) - 1).clamp(min=0, max=sink)
    return visible & (view.places[:, :end] >= first)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid (..., count, d) nearest to points (..., n, d): (..., n) int64."""
    # |p - c|^2 / 2 = |p|^2 / 2 - (p.c - |c|^2 / 2), and |p| is the same for all centroids
    closeness = points @ centroids.mT - centroids.square().sum(dim=-1)[..., None, :] / 2
    return closeness.argmax(dim=-1)


def _kmeans(points: Tensor, members: Tensor, count: int, iterations: int) -> Tensor:
    """Centroids (B, H, parts, count, d) of those points (B, H, parts, n, d) that are members (B, n)
    bool: Lloyd's algorithm from evenly spaced members."""
    order = members.long().argsort(dim=-1, descending=True, stable=True)  # members first
    size = members.sum(dim=-1, keepdim=True)
    ranks = torch.arange(count, device=points.device) * size // count
    start = order.gather(-1, ranks)[:, None, None, :, None]
    members = members.float()[:, None, None, :, None]
    shape = (*points.shape[:3], count, points.shape[4])
    centroids = points.gather(3, start.expand(shape))
    for _ in range(iterations):
        centroids = _means(points, members, centroids)
    return centroids


def _means(points: Tensor, members: Tensor, centroids: Tensor) -> Tensor:
    """Mean of the members nearest to each centroid, the centroid itself where there are none."""
    total, size = torch.zeros_like(centroids), torch.zeros_like(centroids[..., :1])
    for part, weight in zip(
        points.split(TOKENS_AT_ONCE, dim=3), members.split(TOKENS_AT_ONCE, dim=3), strict=True
    ):
        # a product, not scatter_add: the same sums in the same order on every run
        assignment = one_hot(nearest(part, centroids), centroids.shape[3]) * weight
        total += assignment.mT @ part
        size += assignment.sum(dim=3)[..., None]
    return torch.where(size > 0, total / size.clamp(min=1), centroids)

"""Random tokens: the floor that a selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice


@dataclass(frozen=True, eq=False)
class RandomSelector(Selector):
    """A random order of tokens for each query, fixed by seed, layer, KV head and positions.

    Positions count each row's visible tokens, so padding does not change the order.
    """

    name = "random"
    style = MethodStyle("#56b4e9", "X", "random")
    _first_kv_head: ClassVar[int] = 0  # set in the copies that `shard` makes

    seed: int = 0

    def __post_init__(self) -> None:
        require(is_count(self.seed, 0), "seed", self.seed, "a non-negative integer")

    @classmethod
    def usual(cls, context: UsualContext) -> RandomSelector:
        """The comparison's seed."""
        return cls(seed=context.seed)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Int64 (B, KV heads, q, n), uniform in 0..2^31 - 1."""
        kv_heads, n = view.keys.shape[1:3]
        device = view.keys.device
        places = view.places
        rows = places[:, view.query_positions(queries.shape[2])][:, None, :, None]
        tokens = places[:, None, None]
        heads = self._first_kv_head + torch.arange(kv_heads, device=device)
        hashes = torch.full((), self.seed, dtype=torch.int64, device=device)
        for part in (layer, heads[None, :, None, None], rows, tokens):
            hashes = _mix(hashes + part)
        shape = (view.keys.shape[0], kv_heads, queries.shape[2], n)
        return (hashes >> 32 & 0x7FFFFFFF).expand(shape)

    def places(self, layer: int, queries: Tensor, view: KeyView, among: Tensor) -> Tensor:
        """Place in this order of each token of `among` (B, lists, q, n) bool, n for other tokens:
        int64 of this shape."""
        order = self.scores(layer, queries, view, 1.0)
        order = order.repeat_interleave(among.shape[1] // order.shape[1], dim=1)
        order = order.masked_fill(~among, -1).argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(among.shape[-1], device=order.device).expand_as(order)
        places = torch.empty_like(order).scatter_(-1, order, place)
        return places.masked_fill(~among, among.shape[-1])

    def _shard(self, part: HeadSlice) -> RandomSelector:
        return self._with(_first_kv_head=part.kv.start)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014); int64 products wrap, shifts are masked."""
    x = x + -0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)

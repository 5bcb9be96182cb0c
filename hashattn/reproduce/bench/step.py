"""One decode step of one attention layer: encode, select, attend, and its dense peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan
from hashattn.base.checks import require
from hashattn.base.layout import Layout
from hashattn.hashing.maps import HashConfig, LayerMaps, random_maps
from hashattn.kernels import (
    Codes,
    attend,
    dense_decode,
    encode,
    encode_pair,
    layout_for,
    select_by_codes,
    union,
)
from hashattn.reproduce.bench.timing import Clock, Stages

QUERIES = 4  # queries in rotation, so that no selection is still cached from the last sample
_ENCODED_AT_ONCE = 4096  # tokens


@dataclass(frozen=True)
class Shape:
    """Attention heads of one layer and its hash maps; the heads are Llama-3.1-8B's by default.

    Raises ValueError unless query_heads is a multiple of kv_heads.
    """

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    bits: int = 32
    depth: int = 2
    hidden: int = 128

    def __post_init__(self) -> None:
        valid = self.kv_heads >= 1 and self.query_heads % self.kv_heads == 0
        allowed = f"a multiple of kv_heads = {self.kv_heads}"
        require(valid, "query_heads", self.query_heads, allowed)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    def maps(self, layout: Layout, seed: int, precision: str = "bfloat16") -> LayerMaps:
        """Random maps of a layout; precision "bfloat16" rounds them, as trained ones are."""
        config = HashConfig(
            (0,), self.query_heads, self.kv_heads, self.head_dim, layout, self.bits, self.depth,
            self.hidden,
        )  # fmt: skip
        maps = random_maps(config, torch.Generator().manual_seed(seed))
        return maps.rounded() if precision == "bfloat16" else maps


class DecodeStep:
    """One layer's cache of n tokens with codes in both layouts, and queries to decode from it.

    Random keys, values and maps: the selected rows are scattered over the cache, the worst case for
    gathering them. keys, values (1, KV heads, n, D) are contiguous, the fastest layout for torch's
    attention; near_keys, near_values hold the same numbers as the package's cache does, K and V
    rows of a token side by side. queries (QUERIES, 1, query heads, 1, D): methods take one of them,
    query (1, query heads, 1, D), and attention returns that shape.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, budget: Budget, shape: Shape, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n, self.shape, self.budget = n, shape, budget
        self.scaling = shape.head_dim**-0.5
        cache = (1, shape.kv_heads, n, shape.head_dim)
        self.keys, self.values = (torch.randn(cache, generator=generator).to(dtype) for _ in "kv")
        both = torch.stack((self.keys, self.values), dim=3)
        self.near_keys, self.near_values = both[:, :, :, 0], both[:, :, :, 1]
        queries = (QUERIES, 1, shape.query_heads, 1, shape.head_dim)
        self.queries = torch.randn(queries, generator=generator).to(dtype)
        self.maps = {
            layout: shape.maps(layout, seed) for layout in ("per_kv_head", "per_query_head")
        }
        self.codes = {layout: self._encode_cache(maps) for layout, maps in self.maps.items()}
        self.plan = make_plan(None, 1, 1, n, self.keys.device, budget)

    def _encode_cache(self, maps: LayerMaps) -> Codes:
        store = layout_for(self.keys.device)()
        for part in self.keys.split(_ENCODED_AT_ONCE, dim=2):
            store.append(encode(part, maps.key))
        return store

    def encode(self, layout: Layout, query: Tensor, backend: str | None = None) -> Tensor:
        """Codes of the query (1, query heads, 1, words) int32."""
        # a real step encodes its new key too: its codes are computed, and dropped
        maps, key = self.maps[layout], self.near_keys[:, :, -1:]
        return encode_pair(query, maps.query, key, maps.key, backend=backend)[0]

    def select(
        self, layout: Layout, codes: Tensor, lists: int | None = None, backend: str | None = None
    ) -> Tensor:
        """Index lists (1, lists, 1, m) int32, -1 for padding; lists: default one per key code."""
        plan = self.plan
        return select_by_codes(
            codes, self.codes[layout], plan.heavy, plan.sink, plan.local, spans=plan.spans,
            lists=lists, width=plan.width, backend=backend,
        )  # fmt: skip

    def attend(self, query: Tensor, indices: Tensor, backend: str | None = None) -> Tensor:
        """Attention over index lists (1, lists, 1, m) int32."""
        return attend(
            query, self.near_keys, self.near_values, indices, self.scaling, backend=backend
        )

    def sparse(
        self, layout: Layout, query: Tensor, clock: Clock, backend: str | None = None
    ) -> tuple[Tensor, Stages]:
        """The output, and the seconds of encode, select, attend and total."""
        marks = [clock()]
        codes = self.encode(layout, query, backend)
        marks.append(clock())
        indices = self.select(layout, codes, backend=backend)
        marks.append(clock())
        out = self.attend(query, indices, backend)
        marks.append(clock())
        return out, stages(marks, ("encode", "select", "attend"))

    def union(self, query: Tensor, clock: Clock) -> tuple[Tensor, Stages]:
        """`sparse` with a selection per query head, then the union of each group's lists."""
        marks = [clock()]
        codes = self.encode("per_query_head", query)
        marks.append(clock())
        indices = union(self.select("per_query_head", codes), self.shape.kv_heads, self.n)
        marks.append(clock())
        out = self.attend(query, indices)
        marks.append(clock())
        return out, stages(marks, ("encode", "select", "attend"))

    def dense(self, query: Tensor) -> Tensor:
        """This package's dense step on the cache as the package holds it: as all that follow, from
        query to output (1, query heads, 1, head_dim)."""
        return dense_decode(query, self.near_keys, self.near_values, self.scaling)

    def sdpa_gqa(self, query: Tensor) -> Tensor:
        """torch's SDPA with enable_gqa."""
        return scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)

    def sdpa_grouped(self, query: Tensor) -> Tensor:
        """SDPA with the query heads of a group as rows of one KV head."""
        out = scaled_dot_product_attention(self._grouped(query), self.keys, self.values)
        return out.reshape(query.shape)

    def matmul(self, query: Tensor) -> Tensor:
        """Two matrix products around a float32 softmax."""
        logits = self._grouped(query) @ self.keys.transpose(-1, -2) * self.scaling
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ self.values).reshape(query.shape)

    def _grouped(self, query: Tensor) -> Tensor:
        return query.view(1, self.shape.kv_heads, -1, query.shape[-1])


def stages(marks: list[float], names: tuple[str, ...]) -> Stages:
    """Seconds between successive clock readings by name, and their total."""
    spans = [end - start for start, end in zip(marks, marks[1:], strict=False)]
    return dict(zip(names, spans, strict=True)) | {"total": marks[-1] - marks[0]}


# torch's dense attention: sparse is measured against the fastest of these
TORCH_DENSE: dict[str, Callable[[DecodeStep, Tensor], Tensor]] = {
    "sdpa_gqa": DecodeStep.sdpa_gqa,
    "sdpa_grouped": DecodeStep.sdpa_grouped,
    "matmul": DecodeStep.matmul,
}

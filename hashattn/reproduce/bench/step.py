"""One decode step of one attention layer, in one call or stage by stage, and its dense peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan
from hashattn.hashing.maps import LayerMaps
from hashattn.kernels import (
    Codes,
    Drawing,
    attend,
    decode_step,
    dense_decode,
    encode,
    encode_graded,
    encode_pair,
    layout_for,
    sample_by_codes,
    select_by_codes,
    union,
    units_of,
)
from hashattn.reproduce.bench.timing import Clock, Stages
from hashattn.reproduce.bench.ways import WAYS, Shape, Way
from hashattn.selectors.plan import SelectionPlan

QUERIES = 4  # queries in rotation, so that no selection is still cached from the last sample
STAGES = ("encode", "select", "attend")
_ENCODED_AT_ONCE = 4096  # tokens
_SLOPE = 0.5  # nats for a unit of graded score: logits of these random keys spread over one or two

Lists = tuple[Tensor, Tensor | None]  # indices (1, lists, 1, m) int32, -1 for padding; log weights


class DecodeStep:
    """One layer's cache of n tokens with its codes, and queries to decode from it.

    Random keys, values and maps: the selected rows are scattered over the cache, the worst case for
    gathering them. keys, values (1, KV heads, n, D) are contiguous, the fastest layout for torch's
    attention; near_keys, near_values hold the same numbers as the package's cache does, K and V
    rows of a token side by side. queries (QUERIES, 1, query heads, 1, D): methods take one of them,
    query (1, query heads, 1, D), and attention returns that shape. The newest of the n tokens has
    no code yet: every step appends it, and it is dropped again afterwards, outside of the time.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, budget: Budget, shape: Shape, seed: int = 0,
        ways: Mapping[str, Way] = WAYS,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.n, self.shape, self.ways = n, shape, dict(ways)
        self.scaling = shape.head_dim**-0.5
        cache = (1, shape.kv_heads, n, shape.head_dim)
        self.keys, self.values = (torch.randn(cache, generator=generator).to(dtype) for _ in "kv")
        both = torch.stack((self.keys, self.values), dim=3)
        self.near_keys, self.near_values = both[:, :, :, 0], both[:, :, :, 1]
        self.key = self.near_keys[:, :, -1:]
        queries = (QUERIES, 1, shape.query_heads, 1, shape.head_dim)
        self.queries = torch.randn(queries, generator=generator).to(dtype)
        stored = {tuple(way.codes.values()): way.maps(shape, seed) for way in ways.values()}
        codes = {kind: self._encode_cache(maps) for kind, maps in stored.items()}
        kinds = {name: tuple(way.codes.values()) for name, way in ways.items()}
        self.maps = {name: stored[kind] for name, kind in kinds.items()}
        self.codes: dict[str, Codes] = {name: codes[kind] for name, kind in kinds.items()}
        self.plans = {name: self._plan(way, budget) for name, way in ways.items()}
        self._slopes = torch.full((shape.query_heads,), _SLOPE)

    def _encode_cache(self, maps: LayerMaps) -> Codes:
        store = layout_for(self.keys.device)()
        for part in self.keys[:, :, :-1].split(_ENCODED_AT_ONCE, dim=2):
            store.append(encode(part, maps.key))
        return store

    def _plan(self, way: Way, budget: Budget) -> SelectionPlan:
        budget = replace(budget, sampled=way.sampled)
        plan = make_plan(None, 1, 1, self.n, self.keys.device, budget)
        return budget.of_layer(plan, 0, self.shape.kv_heads, way.lists(self.shape))

    def fused(
        self, name: str, query: Tensor, clock: Clock, backend: str | None = None
    ) -> tuple[Tensor, Stages, Lists]:
        """A way's step as the package runs it, one call: the output, the seconds ("total"), and
        what was read."""
        way, plan, maps = self.ways[name], self.plans[name], self.maps[name]
        lists, draw = way.lists(self.shape), plan.draw
        drawing = draw and Drawing(self._slopes[:lists], draw.tokens, draw.trust, draw.coins)
        start = clock()
        out, indices, log_weights = decode_step(
            query, self.near_keys, self.near_values, self.codes[name], maps.query,
            maps.key, heavy=plan.heavy, spans=plan.spans, sink=plan.sink, local=plan.local,
            width=plan.width, lists=lists, scaling=self.scaling, grades=way.grades,
            drawing=drawing, backend=backend,
        )  # fmt: skip
        end = clock()
        self.codes[name].crop(self.n - 1)
        return out, {"total": end - start}, (indices, log_weights)

    def staged(self, name: str, query: Tensor, clock: Clock) -> tuple[Tensor, Stages, Lists]:
        """The same step as one call a stage: the output, the seconds of STAGES, and what was
        read."""
        marks = [clock()]
        codes, steps = self.encode(name, query)
        marks.append(clock())
        read = self.select(name, codes, steps)
        marks.append(clock())
        out = self.attend(query, *read)
        marks.append(clock())
        self.codes[name].crop(self.n - 1)
        return out, stages(marks, STAGES), read

    def encode(self, name: str, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """A way's codes of the query, and the steps of their grades; appends the newest key's."""
        way, maps = self.ways[name], self.maps[name]
        if way.grades is None:
            codes, key = encode_pair(query, maps.query, self.key, maps.key)
            steps = None
        else:
            key = encode(self.key, maps.key)
            codes, steps = encode_graded(query, maps.query, way.lists(self.shape), *way.grades)
        self.codes[name].append(key)
        return codes, steps

    def select(
        self, name: str, codes: Tensor, steps: Tensor | None, lists: int | None = None
    ) -> Lists:
        """What a way reads by the query's codes and the steps of their grades; lists: how many,
        where it is not the way's number."""
        way, plan = self.ways[name], self.plans[name]
        lists = lists or way.lists(self.shape)
        most, where = way.grades and way.grades.most, {"spans": plan.spans, "width": plan.width}
        if plan.draw is None:
            return select_by_codes(
                codes, self.codes[name], plan.heavy, plan.sink, plan.local, lists=lists, most=most,
                **where,
            ), None  # fmt: skip
        drawn, units = plan.draw.tokens.expand(steps.shape), units_of(steps, self._slopes[:lists])
        return sample_by_codes(
            codes, self.codes[name], units, plan.heavy - drawn, drawn, plan.draw.trust,
            plan.draw.coins, plan.sink, plan.local, most=most, **where,
        )  # fmt: skip

    def attend(self, query: Tensor, indices: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Attention over index lists (1, lists, 1, m) int32."""
        return attend(
            query, self.near_keys, self.near_values, indices, self.scaling, log_weights=log_weights
        )

    def union(self, name: str, query: Tensor, clock: Clock) -> tuple[Tensor, Stages]:
        """`staged`, where each group reads the union of its query heads' lists."""
        marks = [clock()]
        codes, steps = self.encode(name, query)
        marks.append(clock())
        indices, _ = self.select(name, codes, steps)
        indices = union(indices, self.shape.kv_heads, self.n)
        marks.append(clock())
        out = self.attend(query, indices)
        marks.append(clock())
        self.codes[name].crop(self.n - 1)
        return out, stages(marks, STAGES) | {"total": marks[-1] - marks[0]}

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
    """Seconds between successive clock readings by name."""
    spans = [end - start for start, end in zip(marks, marks[1:], strict=False)]
    return dict(zip(names, spans, strict=True))


# torch's dense attention: sparse is measured against the fastest of these
TORCH_DENSE: dict[str, Callable[[DecodeStep, Tensor], Tensor]] = {
    "sdpa_gqa": DecodeStep.sdpa_gqa,
    "sdpa_grouped": DecodeStep.sdpa_grouped,
    "matmul": DecodeStep.matmul,
}

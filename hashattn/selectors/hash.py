"""HashAttention: learned codes of keys and queries, ranked by Hamming distance (section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hashattn.base.checks import require_one_of
from hashattn.base.layout import Layout, check_layout
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import (
    Codes,
    Drawing,
    Grades,
    Rule,
    StaticStep,
    decode_step,
    encode_graded,
    hamming_scores,
    sample_by_codes,
    tokens_of,
    units_of,
    unpack_bits,
    verified_step,
)
from hashattn.models.heads import HeadSlice
from hashattn.selectors.base import KeyView
from hashattn.selectors.codes import CodeSelector
from hashattn.selectors.plan import Draw, SelectionPlan
from hashattn.selectors.usual import MethodStyle, UsualContext

_SCORINGS = ("graded", "hamming", "asymmetric")
_STAGES = ("encode_keys", "encode_values", "encode_queries", "select", "sample", "costs")
TOKENS_AT_ONCE = 1024  # activations of a long prefill stay in the processor's cache (1.7x on a CPU)


@dataclass(frozen=True, eq=False)
class HashSelector(CodeSelector):
    """Ranks tokens by matching bits between learned codes of the query and of the keys.

    The weights' layout decides what is stored: "per_query_head" (the official one) a code per query
    head, "per_kv_head" a code per KV head, which its query heads share.

    scoring: "hamming" counts matching bits (the paper's), of weights without folds. "graded" weighs
    each bit by how sure the query's map is of it, in a few binary digits (HashConfig.grades): the
    query is not stored, so this costs no memory. "asymmetric" weighs by the real pre-activations,
    in plain torch: the limit of many digits.
    layout: "per_query_head" selects for every query head, "per_kv_head" sums over the group and
    selects once for all its heads, which reads fewer rows of K and V.
    ValueError for another scoring or layout, one selection per group by codes per query head, or
    bits compared with bits that are digits (folds).
    """

    name = "hash"
    style = MethodStyle("#0072b2", "o", "HashAttention")
    needs = "training"

    weights: HashWeights = field(repr=False)
    scoring: str = "graded"
    layout: Layout = "per_query_head"

    def __post_init__(self) -> None:
        require_one_of("scoring", self.scoring, _SCORINGS)
        check_layout(self.layout)
        if self._per_query_head and self.layout == "per_kv_head":
            raise ValueError(
                'layout = "per_kv_head" needs one code per KV head, and these weights have one per '
                'query head: use layout = "per_query_head"'
            )
        if self.scoring == "hamming" and self.weights.config.folds:
            raise ValueError(
                'scoring = "hamming" counts matching bits, and bits of these weights are digits of '
                'numbers, which a query weighs: use "graded", or train with TrainRecipe.signs()'
            )

    @classmethod
    def usual(cls, context: UsualContext) -> HashSelector:
        """The comparison's weights, graded, a selection per query head."""
        return cls(context.weights)

    @classmethod
    def as_trained(cls, weights: HashWeights) -> HashSelector:
        """What the weights' recipe trained them for: graded bits and a selection per query head, or
        matching bits (TrainRecipe.group "sum") and a selection per key map."""
        if weights.card["recipe"]["group"] == "each":
            return cls(weights)
        return cls(weights, "hamming", weights.config.layout)

    @cached_property
    def slopes(self) -> dict[int, Tensor] | None:
        """The weights' own, where they are read as they were trained (`as_trained`); else None,
        until `fit_slopes` finds others."""
        kept = self.weights.slopes
        each = self.weights.card["recipe"]["group"] == "each" if kept else False
        own = "per_query_head" if each else self.weights.config.layout
        same = each == (self.scoring != "hamming") and self.layout == own
        return kept if same else None

    @property
    def trained(self) -> bool:
        """Whether the weights are."""
        return self.weights.trained

    @property
    def learned_length(self) -> int | None:
        """The weights' own."""
        return self.weights.learned_length

    @property
    def reads_keys(self) -> bool:
        """False, but for a subclass whose stages may look at them."""
        return not self._unchanged

    @property
    def by_codes(self) -> bool:
        """False for real pre-activations, which are not codes."""
        return self.scoring != "asymmetric"

    @property
    def most(self) -> int | None:
        """What a graded query's weights sum to at most."""
        return self.weights.config.grades["most"] if self.scoring == "graded" else None

    @property
    def _per_query_head(self) -> bool:
        return self.weights.config.layout == "per_query_head"

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": int32 (B, KV heads or query heads, n, words)} of keys (B, KV heads, n, D)."""
        parts = keys.split(TOKENS_AT_ONCE, dim=2)
        return {"codes": torch.cat([self.weights.encode_keys(layer, p) for p in parts], dim=2)}

    def encode_queries(self, layer: int, queries: Tensor, view: KeyView | None = None) -> Tensor:
        """Codes int32 (B, query heads, q, words) of queries (B, query heads, q, D), or graded ones
        (B, lists, q, words, 1 + planes)."""
        if self.scoring == "hamming":
            return self.weights.encode_queries(layer, queries)
        return self._graded(layer, queries)[0]

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Matching bits, weighted or not, int32 (B, lists, q, n), or float32 if asymmetric."""
        if self.by_codes:
            return super().scores(layer, queries, view, scaling)
        return self._weighted(layer, queries, view)

    def even_scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Of graded bits: weights in units of the query's pre-activations."""
        if self.scoring != "graded":
            return super().even_scores(layer, queries, view, scaling)
        codes, steps = self._graded(layer, queries)
        return hamming_scores(codes, view.index["codes"], codes.shape[1]) * (2 * steps)[..., None]

    def costs(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Of graded bits: weights of the bits that differ, in what a unit of weight stands for."""
        if not self._priceable:
            return super().costs(layer, queries, view, scaling)
        codes, units = self._priced(layer, queries)
        return -hamming_scores(codes, view.index["codes"], codes.shape[1]) * units[..., None]

    def sample(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Indices and log weights (B, lists, q, m): straight from the codes, where they decide and
        every row sees one interval of tokens."""
        draw = plan.draw
        if draw is None or plan.spans is None or not self._priceable:
            return super().sample(layer, queries, view, scaling, plan)
        codes, units = self._priced(layer, queries)
        drawn = draw.tokens.expand(units.shape)
        return sample_by_codes(
            codes, view.index["codes"], units, plan.heavy - drawn, drawn, draw.trust, draw.coins,
            plan.sink, plan.local, spans=plan.spans, width=plan.width, most=self.most,
        )  # fmt: skip

    def reads_at_once(self, layer: int, plan: SelectionPlan) -> bool:
        """Where codes decide, and every row sees one interval of tokens."""
        drawable = plan.draw is None or self._priceable
        return self.by_codes and drawable and plan.spans is not None and self._unchanged

    def read_at_once(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor,
        stores: Mapping[str, Codes], plan: SelectionPlan, logits: Mapping[str, Any],
        counters: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Output, indices and log weights, by `kernels.decode_step`."""
        self.weights.check_queries(query)
        maps, draw = self.weights.layer(layer, query.device), plan.draw
        drawing = None if draw is None else self._drawing(layer, draw, draw.tokens)
        return decode_step(
            query, keys, values, stores["codes"], maps.query, maps.key, heavy=plan.heavy,
            spans=plan.spans, sink=plan.sink, local=plan.local, width=plan.width,
            lists=self.lists(query.shape[1], keys.shape[1]),
            grades=self._grades, drawing=drawing, counters=counters, **logits,
        )  # fmt: skip

    def read_verified(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor,
        stores: Mapping[str, Codes], plan: SelectionPlan, logits: Mapping[str, Any], rule: Rule,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:  # fmt: skip
        """Output, indices, log weights and levels, by `kernels.verified_step`."""
        self.weights.check_queries(query)
        maps, draw = self.weights.layer(layer, query.device), plan.draw
        lists, drawing = self.lists(query.shape[1], keys.shape[1]), None
        if draw is not None:
            drawing = self._drawing(layer, draw, draw.shares(lists))
        return verified_step(
            query, keys, values, stores["codes"], maps.query, maps.key, rule=rule,
            heavy=plan.heavy, spans=plan.spans, sink=plan.sink, local=plan.local, lists=lists,
            grades=self._grades, drawing=drawing, **logits,
        )  # fmt: skip

    def static_step(
        self, layer: int, query: Tensor, kv_heads: int, plan: SelectionPlan, width: int,
        logits: Mapping[str, Any],
    ) -> StaticStep | None:  # fmt: skip
        """Settings of a layer's steps where they are read at once."""
        if not self.reads_at_once(layer, plan):
            return None
        self.weights.check_queries(query)
        maps, draw, drawn = self.weights.layer(layer, query.device), plan.draw, {}
        if draw is not None:
            slopes = self._slopes_on(layer, query.device)
            drawn = {"slopes": slopes, "trust": draw.trust, "coins": draw.coins}
        return StaticStep(
            maps.query, maps.key, self.lists(query.shape[1], kv_heads), plan.sink, plan.local,
            width, logits["scaling"], self._grades, logits["softcap"], **drawn,
        )  # fmt: skip

    @cached_property
    def _unchanged(self) -> bool:
        """Whether this class has its stages from here: one of a subclass's own must be called."""
        return all(getattr(type(self), name) is getattr(HashSelector, name) for name in _STAGES)

    def _drawing(self, layer: int, draw: Draw, drawn: Tensor) -> Drawing:
        return Drawing(self._slopes_on(layer, drawn.device), drawn, draw.trust, draw.coins)

    def _slopes_on(self, layer: int, device: torch.device) -> Tensor:
        """A layer's slopes on a device, copied once: a step waits for a copy to a GPU."""
        placed, slopes = self.__dict__.setdefault("_placed_slopes", {}), self.slopes[layer]
        if placed.get((layer, device), (None, None))[0] is not slopes:
            placed[layer, device] = slopes, slopes.to(device)
        return placed[layer, device][1]

    @property
    def _priceable(self) -> bool:
        return self.scoring == "graded" and self.slopes is not None

    @property
    def _grades(self) -> Grades | None:
        return Grades(**self.weights.config.grades) if self.scoring == "graded" else None

    def _priced(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Graded codes (B, lists, q, words, 1 + planes) of queries (B, heads, q, D), and what each
        unit of weight costs, int64 (B, lists, q) in 1 / NAT nats."""
        codes, steps = self._graded(layer, queries)
        return codes, units_of(steps, self.slopes[layer])

    def _graded(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Graded codes of queries (B, heads, q, D), and the steps of their grades, in
        pre-activations, float32 (B, lists, q)."""
        self.weights.check_queries(queries)
        maps = self.weights.layer(layer, queries.device).query
        lists = self.lists(queries.shape[1], self.weights.config.kv_heads)
        return encode_graded(queries, maps, lists, *self._grades)

    def _weighted(self, layer: int, queries: Tensor, view: KeyView) -> Tensor:
        """Signs of the keys' codes, weighted by pre-activations, float32 (B, lists, q, n)."""
        pre, codes = self._preactivations(layer, queries), tokens_of(view.index["codes"])
        signs = unpack_bits(codes, pre.shape[-1]).float() * 2 - 1
        return pre @ signs.repeat_interleave(pre.shape[1] // signs.shape[1], dim=1).mT

    @torch.no_grad()
    def _preactivations(self, layer: int, queries: Tensor) -> Tensor:
        """Pre-activations (B, lists, q, bits) float32, summed over the heads that share a list."""
        pre = self.weights.preactivations_queries(layer, queries)
        if self.layout == "per_query_head":
            return pre
        return pre.unflatten(1, (self.weights.config.kv_heads, -1)).sum(dim=2)

    def _shard(self, part: HeadSlice) -> HashSelector:
        return self._with(weights=self.weights.shard(part))

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """bits per KV head, times the group when every query head has its own code."""
        bits = self.weights.config.bits
        return float(bits * group if self._per_query_head else bits)

    def parameters(self) -> dict[str, Any]:
        """The weights' layout and sizes, and the settings."""
        config = self.weights.config
        shape = {"codes": config.layout, "bits": config.bits, "depth": config.depth}
        return shape | super().parameters()

    def weights_sha256(self) -> str:
        """The hash weights' content hash."""
        return self.weights.sha256

    def record(self) -> dict[str, Any]:
        """Also `forced`, how the model differs from the weights' own, where that was accepted."""
        forced = {"forced": list(self.weights.forced)} if self.weights.forced else {}
        return super().record() | forced

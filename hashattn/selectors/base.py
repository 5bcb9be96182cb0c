"""The selector interface: a method that ranks cached tokens for a query.

A selector ranks; it has no rules of its own for sink, local and heavy tokens. All methods share one
selection: from scores by `hashattn_kernels.select`, or from codes by `select_by_codes`, which is
the same bit for bit.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from uuid import uuid4

import torch
from torch import Tensor

from hashattn.base.layout import Layout
from hashattn.kernels import NAT, GrowableBuffer, Rule, StaticStep, sample, select
from hashattn.selectors.plan import SelectionPlan

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice
    from hashattn.selectors.usual import MethodStyle, UsualContext

_COSTLIEST = 1 << 20  # a cost that no coin reaches, in 1 / NAT nats
NORM_BITS = 16  # of the stored norm of a value or a key
SETTINGS = (str, int, float, tuple, type(None))  # what a record can hold of a field


class IndexStore(Protocol):
    """One part of a selector's index, with all that a cache layer needs of it; axis 0 is the batch.

    value: what `scores` finds in KeyView.index, a tensor or the store itself.
    """

    @property
    def value(self) -> Any: ...
    def append(self, part: Tensor) -> None: ...
    def crop(self, length: int) -> None: ...
    def map(self, change: Callable[[Tensor], Tensor]) -> None: ...


@dataclass(frozen=True)
class KeyView:
    """What a selector may look at in one layer's cache.

    keys: (batch, kv_heads, n, head_dim), post-RoPE. index: the selector's own data, token axis 2:
    from `encode_keys` and `encode_values`, length n (codes may come as the store that holds them),
    and from `observe`, shorter by the tokens of this call. visible: (batch, n) bool, False for
    padding wherever it lies (a padded question may follow a padded prefix), or None when every
    token is visible. positions: (q,) cache index of each query row, or None when the query rows are
    the last q tokens.
    """

    keys: Tensor
    index: dict[str, Tensor | IndexStore] = field(default_factory=dict)
    visible: Tensor | None = None
    positions: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """How many visible tokens of its row come before each token: (batch or 1, n) int64.

        In a row without padding, the cache index. An invisible token has the place of the visible
        one that follows it.
        """
        if self.visible is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device)[None]
        return self.visible.cumsum(dim=-1) - self.visible.long()

    def real_queries(self, q_len: int) -> Tensor:
        """Which query rows are not padding: (batch or 1, q_len) bool."""
        positions = self.query_positions(q_len)
        if self.visible is None:
            return torch.ones_like(positions, dtype=torch.bool)[None]
        return self.visible[:, positions]

    def of_rows(self, score: Callable[[slice, Tensor | slice], Tensor]) -> Tensor:
        """Scores (batch, lists, q, n) of each row from its visible tokens alone, -inf elsewhere.

        score(rows, tokens) gives (rows, lists, q, tokens) for the tokens that these rows see; it is
        called row by row, or once for all rows where they see everything.
        """
        if self.visible is None or bool(self.visible.all()):
            return score(slice(None), slice(None))
        rows = []
        for row, visible in enumerate(self.visible):
            tokens = visible.nonzero()[:, 0]
            scores = score(slice(row, row + 1), tokens)
            hidden = scores.new_full((*scores.shape[:3], len(visible)), -torch.inf)
            rows.append(hidden.index_copy(3, tokens, scores))
        return torch.cat(rows)

    def query_positions(self, q_len: int) -> Tensor:
        """Cache index of each query row: (q_len,) int64."""
        if self.positions is not None:
            return self.positions.to(self.keys.device)
        n = self.keys.shape[2]
        return torch.arange(n - q_len, n, device=self.keys.device)

    def causal(self, q_len: int) -> Tensor:
        """Tokens that each query row may attend to: (batch or 1, 1, q_len, n) bool."""
        tokens = torch.arange(self.keys.shape[2], device=self.keys.device)
        allowed = (tokens <= self.query_positions(q_len)[:, None])[None, None]
        return allowed if self.visible is None else allowed & self.visible[:, None, None]


class Traits:
    """What a method declares of itself: class attributes, fields or properties.

    name: its name in records. style: how figures draw it; None for a colour and a marker that no
    other method has. reads_keys: False where scores look at the index alone, so that keys may lie
    elsewhere. sparse: False for a baseline that reads everything; its attention is the
    model's own. kernel: whether the decode steps of such a baseline go through this package's
    `dense_decode` instead, on a CPU. trained: False for hash weights that were initialised at
    random. layout: "per_kv_head" gives one list of tokens per KV head, "per_query_head" one per
    query head. needs: "nothing", "calibration" or "training" before it can rank. ranks: False for
    methods whose `select` is not simply the best of their scores. evicts: True for methods that
    drop tokens for good. observes: True for methods that decide from attention they saw, see
    `observe`. value_norms: True for methods that weigh a token by the norm of its value, see
    `encode_values`. sums_weights: True where scores are attention weights summed over a group of
    heads, not logits. slopes: {layer: (lists,) float32}, nats of attention logit for a unit of
    score; None where scores only rank.
    """

    # not in Selector, whose dataclass would put these before the fields of every method
    name: str
    style: MethodStyle | None = None
    reads_keys: bool = True
    sparse: bool = True
    kernel: bool = False
    trained: bool = True
    layout: Layout = "per_kv_head"
    needs: Literal["nothing", "calibration", "training"] = "nothing"
    ranks: bool = True
    evicts: bool = False
    observes: bool = False
    value_norms: bool = False
    sums_weights: bool = False
    slopes: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Selector(Traits, ABC):
    """Ranks cached tokens for queries; one subclass per method.

    Each is a dataclass(frozen=True, eq=False) whose fields are its settings, checked in
    `__post_init__`, and its data: tensors, weights, another selector. Data is a field(repr=False),
    and the settings, which repr shows, are what the record names.
    """

    @classmethod
    def usual(cls, context: UsualContext) -> Self:
        """The method in the setting in which comparisons run it; here its defaults."""
        return cls()

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """Data stored for new tokens' keys (batch, kv_heads, new, head_dim), token axis 2.

        Called once per token; the attention appends the result to the cache layer.
        """
        return {}

    def encode_values(self, layer: int, values: Tensor) -> dict[str, Tensor]:
        """Data stored for new tokens' values (batch, kv_heads, new, Dv), beside `encode_keys`'s.

        {"value_norms": (batch, kv_heads, new, 1) bfloat16} where `value_norms` is True, as a token
        adds its attention weight times its value to the output (HashAttention, Lemma 4.1).
        """
        if not self.value_norms:
            return {}
        return {"value_norms": values.float().norm(dim=-1, keepdim=True).bfloat16()}

    def new_store(self, name: str, part: Tensor) -> IndexStore:
        """An empty store for the data that `encode_keys` or `encode_values` calls `name`; part
        (batch, heads, new, ...): its first tokens."""
        return GrowableBuffer(axis=2)

    def index_of(
        self, layer: int, keys: Tensor, values: Tensor | None = None
    ) -> dict[str, Tensor | IndexStore]:
        """What `scores` finds in KeyView.index for one sequence's keys (KV heads, n, D) and values:
        in stores, as in a cache, so that what a store derives from its keys is derived once."""
        parts = self.encode_keys(layer, keys[None])
        if values is not None:
            parts = parts | self.encode_values(layer, values[None])
        stores = {name: self.new_store(name, part) for name, part in parts.items()}
        for name, part in parts.items():
            stores[name].append(part)
        return {name: store.value for name, store in stores.items()}

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is remembered of all n cached tokens after a call, token axis 2; replaces the state
        before it.

        Called where `observes` is True, for every call of a layer with its queries (batch, heads,
        q, head_dim): prefill chunks and dense steps with read = None (every row reads all it sees),
        sparse calls after their selection with its indices, read (batch, lists, q, m) int32. The
        cache keeps the state; during a call view.index has it, without the call's own tokens.
        """
        return {}

    @abstractmethod
    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Relevance (batch, lists, q, n), larger is better, any real or integer dtype.

        queries (batch, heads, q, head_dim). Scores of invisible tokens are ignored. A float
        score of -inf means that the token is never selected as heavy; NaN is an error.
        """

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (batch, lists, q, m) int32, -1 padded, of what each row reads: mandatory and
        heavy tokens."""
        scores = self.scores(layer, queries, view, scaling)
        self._check_scores(scores, queries, view)
        return select(scores, plan.heavy, plan.candidates, plan.mandatory)

    def sample(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor | None]:
        """What attention reads: `select`'s indices, and log weights to add to their logits.

        Log weights (batch, lists, q, m) float32 are minus the log of the inclusion probability with
        which a token was drawn, None where nothing is drawn. By plan.draw, or by the method's own
        rules where it samples by itself.
        """
        if plan.draw is None:
            return self.select(layer, queries, view, scaling, plan), None
        draw, lists = plan.draw, self.lists(queries.shape[1], view.keys.shape[1])
        costs = self.costs(layer, queries, view, scaling)
        shape = costs.shape[:3]
        drawn = draw.tokens.expand(shape)
        certain = plan.heavy.expand(shape) - drawn
        places = view.places.expand(len(plan.visible), -1)
        return sample(
            costs, certain, drawn, draw.trust, draw.coins.of(lists, plan.visible, places),
            plan.candidates, plan.mandatory,
        )  # fmt: skip

    def reads_at_once(self, layer: int, plan: SelectionPlan) -> bool:
        """Whether `read_at_once` takes a layer's step of one row by this plan."""
        return False

    def read_at_once(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor,
        stores: Mapping[str, IndexStore], plan: SelectionPlan, logits: Mapping[str, Any],
        counters: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """A decode step of a layer in one call: output (batch, heads, 1, Dv), and what it read as
        `sample` has it.

        query (batch, heads, 1, head_dim); keys, values (batch, kv_heads, at least plan.n, dim) with
        the newest token, whose part of the index the call appends to `stores`; logits: keywords of
        `kernels.attend`; counters: of `kernels.decode_step`. The same as `encode_keys`, `sample`
        and `attend`, bit for bit.
        """
        raise NotImplementedError(f"selector {self.name!r} reads step by step")

    def read_verified(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor,
        stores: Mapping[str, IndexStore], plan: SelectionPlan, logits: Mapping[str, Any],
        rule: Rule,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:  # fmt: skip
        """`read_at_once` with lists that grow by a rule: output, indices, log weights and levels as
        of `kernels.verified_step`; None, with nothing appended, where that is no one call."""
        return None

    def static_step(
        self, layer: int, query: Tensor, kv_heads: int, plan: SelectionPlan, width: int,
        logits: Mapping[str, Any],
    ) -> StaticStep | None:  # fmt: skip
        """What of `read_at_once` stays over a static cache, for `kernels.static_step`; None for a
        method that it does not read.

        query (batch, heads, 1, head_dim); plan: of a full cache; width: of the lists.
        """
        return None

    def costs(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """What tokens are drawn by: minus the estimated logits (batch, lists, q, n) int64, in
        1 / NAT nats, up to a constant of the row."""
        logits = self.estimates(layer, queries, view, scaling)
        self._check_scores(logits, queries, view)
        logits = logits.float().masked_fill(~view.causal(queries.shape[2]), -torch.inf)
        below = logits.amax(dim=-1, keepdim=True) - logits
        return (NAT * below).nan_to_num(_COSTLIEST, _COSTLIEST).clamp(max=_COSTLIEST).round().long()

    def estimates(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Estimated logits (batch, lists, q, n) up to a constant of the row; where heads share a
        list, of the sum of their attention weights.

        Here even_scores times `slopes`. ValueError where these are missing.
        """
        self.require_estimates(layer)
        scores = self.even_scores(layer, queries, view, scaling)
        return scores * self.slopes[layer].to(scores.device)[:, None, None]

    def estimates_logits(self, layer: int) -> bool:
        """Whether tokens can be drawn by this method's scores in a layer."""
        fitted = self.slopes is not None and layer in self.slopes
        return fitted and self.ranks and not self.observes

    def require_estimates(self, layer: int) -> None:
        """ValueError, with what to do, where `estimates_logits` is False."""
        if self.estimates_logits(layer):
            return
        if not self.ranks or self.observes:
            raise ValueError(
                f"selector {self.name!r} does not read the best of its scores, so none of its "
                "tokens can be drawn by them: read with Budget(sampled=0)"
            )
        raise ValueError(
            f"selector {self.name!r}: its scores estimate no logits in layer {layer}, so no tokens "
            "can be drawn by them; calibrate it with hashattn.selectors.fit_slopes, or read with "
            "Budget(sampled=0)"
        )

    def even_scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Scores float32 (batch, lists, q, n), or their logarithms where they are weights, in a
        unit that is the same for all queries."""
        scores = self.scores(layer, queries, view, scaling).float()
        return scores.log() if self.sums_weights else scores

    def _check_scores(self, scores: Tensor, queries: Tensor, view: KeyView) -> None:
        batch, heads, q_len, _ = queries.shape
        _, kv_heads, n, _ = view.keys.shape
        expected = (batch, self.lists(heads, kv_heads), q_len, n)
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"selector {self.name!r} (layout {self.layout!r}): scores have shape "
                f"{tuple(scores.shape)}, expected (batch, lists, q, n) = {expected}"
            )

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """Bits that this package stores per token per KV head, `group` query heads sharing one."""
        return 0.0

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """Bits per token per KV head that the method needs: what methods are compared at.

        Counted as its authors store them. `auxiliary_bits` differs where this package stores more,
        in whole bytes, or nothing and computes them from the keys at each step.
        """
        return self.auxiliary_bits(group, head_dim)

    def read_bits(self, group: int, head_dim: int) -> float:
        """Bits read per token per KV head to rank the tokens for one query of each of its heads:
        `nominal_bits`, unless a method ranks by the cache itself or by a part of its data."""
        return self.nominal_bits(group, head_dim)

    def shard(self, part: HeadSlice) -> Self:
        """This method for a process that holds a part of a model's heads; attach calls it.

        The same object every time, so that its index in a cache and its maps on a device are kept.
        ValueError where it was made for a model of other heads, UnsupportedModelError where it
        needs all heads at once.
        """
        shards = self.__dict__.setdefault("_shards", {})
        if part not in shards:
            shard = self._shard(part)
            if self.slopes is not None:
                shard = shard._with(slopes=part.of_layers(self.slopes))
            shards[part] = shard
        return shards[part]

    def _shard(self, part: HeadSlice) -> Self:
        """A copy with the state of these heads; the method itself where no state is by head."""
        return self

    def _with(self, **changes: Any) -> Self:
        """A shallow copy with other attributes, which are not checked again."""
        changed = copy.copy(self)
        changed.__dict__.update(changes, _shards={}, _identity=uuid4().hex)
        return changed

    def _settle(self, **attributes: Any) -> None:
        """For `__post_init__` alone: set fields in their final form, and state made from them."""
        self.__dict__.update(attributes)

    def record(self) -> dict[str, Any]:
        """JSON-able description for receipts: name, parameters, weights_sha256 or None."""
        return {
            "name": self.name,
            "parameters": self.parameters(),
            "weights_sha256": self.weights_sha256(),
        }

    def parameters(self) -> dict[str, Any]:
        """The settings by name, in the order of their fields.

        Raises TypeError for a field that is no setting and not marked as data.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        for name, value in settings.items():
            if not isinstance(value, SETTINGS):
                raise TypeError(
                    f"selector {self.name!r}: its field {name!r} holds a {type(value).__name__}, "
                    "which a record cannot hold; mark data by field(repr=False)"
                )
        return settings

    def weights_sha256(self) -> str | None:
        """SHA-256 (hex) of the weights or the calibration, None for a method without."""
        return None

    @property
    def learned_length(self) -> int | None:
        """Tokens of the longest context that the method learned from; None where it learns nothing,
        or nobody noted it. Queries and keys further apart than that are new to it."""
        return None

    def lists(self, heads: int, kv_heads: int) -> int:
        """Number of token lists for a layer with these head counts."""
        return kv_heads if self.layout == "per_kv_head" else heads

    @property
    def identity(self) -> str:
        """Key under which a cache layer stores this selector's index.

        A string rather than the object, so that deepcopy(cache) does not copy hash weights.
        """
        if "_identity" not in self.__dict__:
            # setdefault is atomic: threads that come at the same time get the same key
            self.__dict__.setdefault("_identity", uuid4().hex)
        return self.__dict__["_identity"]

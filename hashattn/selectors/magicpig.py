"""MagicPIG (Chen et al. 2024): sample tokens by hash collisions, weighted by their probability."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.kernels import gather_tokens, mask_to_indices
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.calibration import CapturedRows, mean_by_layer, tensors_sha256
from hashattn.selectors.hyperplanes import Hyperplanes
from hashattn.selectors.plan import SelectionPlan
from hashattn.selectors.random import RandomSelector
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

LEAST = 1e-4  # sampling probabilities are at least this, as in the paper's code
_MOST_BITS = 15  # of a table's bucket number, stored as int16


@dataclass(frozen=True, eq=False)
class MagicPIGSelector(Selector):
    """A token is sampled if it shares the query's bucket in at least two of `tables` SimHash tables
    of `bits` hyperplanes each; sink and local tokens are always read.

    With p = 1 - angle(q, k) / pi for one hyperplane, that happens with probability
    u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1), and the sampled token's logit falls by log u
    (self-normalised importance sampling, section 4). Keys are centred by their calibrated mean, if
    there is one, for the angles only. The method has no budget: where more tokens than the heavy
    budget collide, a uniform sample of them is read, with weights to match. One list a query head.
    centers {layer: (KV heads, D)}. ValueError for bits or tables out of range.
    """

    name = "magicpig"
    ranks = False
    style = MethodStyle("#661100", "d", "MagicPIG")
    layout = "per_query_head"

    bits: int = 10
    tables: int = 150
    seed: int = 0
    centers: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        bits, tables = self.bits, self.tables
        require(1 <= bits <= _MOST_BITS, "bits", bits, f"within 1..{_MOST_BITS}")
        require(tables >= 2, "tables", tables, "at least 2: a token has to collide twice")
        self._settle(
            centers=dict(self.centers or {}),
            order=RandomSelector(self.seed),
            _planes=Hyperplanes(self.seed),
        )

    @classmethod
    def usual(cls, context: UsualContext) -> MagicPIGSelector:
        """The authors' tables, centred on the comparison's captures."""
        return cls.calibrate(context.calibrated, seed=context.seed)

    @property
    def needs(self) -> str:
        """Calibration, where keys are centred."""
        return "calibration" if self.centers else "nothing"

    @classmethod
    def calibrate(cls, captured: Iterable[CapturedRows], **parameters: Any) -> MagicPIGSelector:
        """A MagicPIGSelector centred on the mean captured key of each layer and KV head."""
        return cls(centers=mean_by_layer(captured, lambda c: c.keys), **parameters)

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"buckets": int16 (B, KV heads, n, tables)} of keys (B, KV heads, n, D)."""
        return {"buckets": self._buckets(layer, self._centred(layer, keys))}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Tables in which query and key collide, int16 (B, query heads, q, n)."""
        of_queries = self._buckets(layer, queries)
        group = queries.shape[1] // view.keys.shape[1]
        of_keys = view.index["buckets"].repeat_interleave(group, dim=1)
        collisions = of_queries.new_zeros(*of_queries.shape[:3], of_keys.shape[2])
        for table in range(self.tables):  # one at a time: (B, heads, q, n) and no table axis
            collisions += of_queries[..., table, None] == of_keys[:, :, None, :, table]
        return collisions

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (B, query heads, q, m) int32, -1 padded, of the tokens that are read."""
        return self.sample(layer, queries, view, scaling, plan)[0]

    def sample(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor]:
        """Indices (B, query heads, q, m) int32, -1 padded, and log weights of this shape, float32:
        0 for sink and local tokens, -log of the sampling probability for the others."""
        collided = (self.scores(layer, queries, view, scaling) >= 2) & plan.candidates
        count = collided.sum(dim=-1)
        room = plan.heavy.expand_as(count)
        sampled = collided & (self.order.places(layer, queries, view, collided) < room[..., None])
        indices = mask_to_indices(sampled | plan.mandatory)
        at = indices.clamp(min=0).long()
        weights = -self._log_probability(layer, queries, view.keys, indices)
        weights = weights + (count / torch.minimum(count, room).clamp(min=1)).log()[..., None]
        return indices, torch.where(sampled.gather(-1, at), weights, 0.0)

    def _log_probability(
        self, layer: int, queries: Tensor, keys: Tensor, indices: Tensor
    ) -> Tensor:
        """log u of the listed tokens, float32 (B, query heads, q, m)."""
        listed = gather_tokens(self._centred(layer, keys), indices).float()
        cosine = torch.cosine_similarity(listed, queries.float()[:, :, :, None], dim=-1)
        hit = (1 - cosine.clamp(-1, 1).arccos() / torch.pi) ** self.bits  # p^K, in one table
        none, one = (1 - hit) ** self.tables, self.tables * hit * (1 - hit) ** (self.tables - 1)
        return (1 - none - one).clamp(min=LEAST).log()

    def _centred(self, layer: int, keys: Tensor) -> Tensor:
        if layer not in self.centers:
            return keys
        return keys - self.centers[layer].to(keys)[:, None]

    def _buckets(self, layer: int, x: Tensor) -> Tensor:
        """int16 (B, H, n, tables) of x (B, H, n, D); all heads of a layer share the tables."""
        planes = self._planes(layer, (x.shape[-1], self.tables * self.bits), x.device)
        signs = (x.float() @ planes > 0).unflatten(-1, (self.tables, self.bits))
        powers = 2 ** torch.arange(self.bits, device=x.device, dtype=torch.float32)
        return (signs.float() @ powers).to(torch.int16)

    def _shard(self, part: HeadSlice) -> MagicPIGSelector:
        return self._with(centers=part.of_layers(self.centers), order=self.order.shard(part))

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """An int16 for each table."""
        return 16.0 * self.tables

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """tables * bits."""
        return float(self.tables * self.bits)

    def parameters(self) -> dict[str, Any]:
        """The settings, and whether keys are centred."""
        return super().parameters() | {"centred": bool(self.centers)}

    def weights_sha256(self) -> str | None:
        """Of the centers, None without them."""
        return tensors_sha256(self.centers) if self.centers else None

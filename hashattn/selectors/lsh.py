"""SimHash: random hyperplanes instead of learned maps, the data-independent baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.kernels import pack_bits
from hashattn.selectors.base import KeyView
from hashattn.selectors.calibration import CapturedRows, mean_by_layer, tensors_sha256
from hashattn.selectors.codes import CodeSelector
from hashattn.selectors.hyperplanes import Hyperplanes
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

TOKENS_AT_ONCE = 4096  # bounds the float pre-activations while a long prefill is encoded


@dataclass(frozen=True, eq=False)
class LSHSelector(CodeSelector):
    """Ranks tokens by matching bits of sign(W x), W ~ N(0, 1) drawn once (Charikar 2002).

    bits: any positive multiple of 32; a bit of a query and of a key agree with probability
    1 - angle / pi, so the count estimates their cosine. layout "per_kv_head": one W per KV head,
    matches summed over the group, one selection per group; "per_query_head": one W and one code per
    query head as in the official code's LSH baseline, which needs query_heads. seed and layer fix W
    on every device. centers {layer: (KV heads, D)}: subtracted from keys before hashing (MagicPIG
    centres keys; q.k ranks the same with or without), see calibrate. Unlike the official baseline
    no norm coordinate is appended: it needs the largest norm of all keys, which a cache that grows
    token by token does not know.
    """

    name = "lsh"
    style = MethodStyle("#cc79a7", "D", "LSH")
    part: ClassVar[HeadSlice | None] = None  # set in the copies that `shard` makes

    bits: int = 32
    seed: int = 0
    layout: Layout = "per_kv_head"
    query_heads: int | None = field(default=None, repr=False)
    centers: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        bits = self.bits
        require(bits > 0 and bits % 32 == 0, "bits", bits, "a positive multiple of 32")
        check_layout(self.layout)
        if self.layout == "per_query_head" and self.query_heads is None:
            raise ValueError(
                'layout = "per_query_head" stores a code per query head: give query_heads'
            )
        self._settle(
            query_heads=self.query_heads if self.layout == "per_query_head" else None,
            centers=dict(self.centers or {}),
            _planes=Hyperplanes(self.seed),
        )

    @classmethod
    def usual(cls, context: UsualContext) -> LSHSelector:
        """As many bits as the comparison's hashes."""
        return cls(bits=context.weights.config.bits, seed=context.seed)

    @property
    def needs(self) -> str:
        """Calibration, where keys are centred."""
        return "calibration" if self.centers else "nothing"

    @classmethod
    def calibrate(cls, captured: Iterable[CapturedRows], **parameters: Any) -> LSHSelector:
        """An LSHSelector whose centers are the mean captured key of each layer and KV head."""
        return cls(centers=mean_by_layer(captured, lambda c: c.keys), **parameters)

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": int32 (B, lists, n, bits / 32)} of keys (B, KV heads, n, D)."""
        if layer in self.centers:
            keys = keys - self.centers[layer].to(keys)[:, None]
        heads = self.query_heads or keys.shape[1]
        return {"codes": self._encode(layer, keys, heads)}

    def encode_queries(self, layer: int, queries: Tensor, view: KeyView) -> Tensor:
        """Codes int32 (B, query heads, q, bits / 32), a group's under its KV head's planes."""
        return self._encode(layer, queries, view.index["codes"].shape[1])

    def _shard(self, part: HeadSlice) -> LSHSelector:
        return self._with(
            query_heads=len(part.query) if self.query_heads else None,
            centers=part.of_layers(self.centers),
            part=part,
        )

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """bits per KV head, times the group in layout "per_query_head"."""
        return float(self.bits * (group if self.layout == "per_query_head" else 1))

    def parameters(self) -> dict[str, Any]:
        """The settings, and whether keys are centred."""
        return super().parameters() | {"centred": bool(self.centers)}

    def weights_sha256(self) -> str | None:
        """Of the centers, None without them."""
        return tensors_sha256(self.centers) if self.centers else None

    def _encode(self, layer: int, x: Tensor, sets: int) -> Tensor:
        """Codes of x (B, H, n, D) under `sets` sets of hyperplanes: (B, max(H, sets), n, words)."""
        if self.part is None:
            planes = self._planes(layer, (sets, x.shape[-1], self.bits), x.device)
        else:  # drawn for all heads, or every process would draw those of the first one
            shape = (sets * self.part.ranks, x.shape[-1], self.bits)
            planes = self.part.of(self._planes(layer, shape, x.device))
        heads = x.shape[1]
        if heads < sets:  # a code per query head of keys held per KV head
            x = x.repeat_interleave(sets // heads, dim=1)
        elif sets < heads:  # the group's queries under their KV head's planes
            planes = planes.repeat_interleave(heads // sets, dim=0)
        parts = x.float().split(TOKENS_AT_ONCE, dim=2)
        return torch.cat([pack_bits(part @ planes) for part in parts], dim=2)

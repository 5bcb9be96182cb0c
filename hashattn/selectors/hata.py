"""HATA (Gong et al. 2025): codes of a learned linear hash shared by the queries and keys of a head.

Training is in hashattn.hashing.hata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.kernels import Maps, encode
from hashattn.selectors.base import NORM_BITS, KeyView
from hashattn.selectors.calibration import tensors_sha256
from hashattn.selectors.codes import CodeSelector
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer
    from hashattn.models.heads import HeadSlice

STEPS = 300  # of training
TOKENS_AT_ONCE = 1024  # as in selectors.hash: a long prefill stays in the processor's cache


@dataclass(frozen=True, eq=False)
class HATASelector(CodeSelector):
    """Ranks tokens by matching bits of (x W > 0), summed over the group: one selection per KV head.

    weights {layer: (KV heads, D, bits)}, bits a multiple of 32: one W for a KV head's keys and its
    group's queries, both after the rotary embedding. key_norm: score = |k| sum_g (1 - 2 d_g / bits)
    with d_g the Hamming distance, which the authors' code does by default and their paper does not;
    scores are then not integers, so tokens are selected by them and not by the codes alone.
    trained: False for weights that were drawn at random.
    """

    name = "hata"
    style = MethodStyle("#ee8866", (5, 0, 180), "HATA")
    layout = "per_kv_head"
    needs = "training"

    weights: Mapping[int, Tensor] = field(repr=False)
    key_norm: bool = False
    trained: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        shapes = {tuple(tensor.shape) for tensor in self.weights.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            raise ValueError(
                f"weights need one shape (KV heads, D, bits) in every layer, not {sorted(shapes)}"
            )
        bits = self.bits
        require(bits > 0 and bits % 32 == 0, "bits", bits, "a positive multiple of 32")
        maps: dict[tuple[int, torch.device], Maps] = {}
        weights = {layer: tensor.detach().float() for layer, tensor in self.weights.items()}
        self._settle(weights=weights, _maps=maps)

    @classmethod
    def usual(cls, context: UsualContext) -> HATASelector:
        """Trained on the comparison's captures, with as many bits as its hashes."""
        return cls.train(
            context.calibrated,
            bits=context.weights.config.bits,
            steps=min(STEPS, context.steps or STEPS),
            seed=context.seed,
            progress=False,
        )

    @property
    def bits(self) -> int:
        """Bits of a code, the same in every layer."""
        return next(iter(self.weights.values())).shape[-1]

    @property
    def by_codes(self) -> bool:
        """False with key norms, which are not in the codes."""
        return not self.key_norm

    @classmethod
    def train(
        cls,
        captured: Iterable[CapturedLayer],
        bits: int = 128,
        steps: int = STEPS,
        seed: int = 0,
        key_norm: bool = False,
        progress: bool = True,
        **recipe: Any,
    ) -> HATASelector:
        """A HATASelector trained on captured layers of sequences, by the authors' recipe.

        recipe: other fields of hashattn.hashing.hata.HataRecipe. steps = 0 keeps the random start
        (and says so in `trained`). ValueError for a field out of range or nothing captured.
        """
        from hashattn.hashing.hata import HataRecipe, train_hata_weights

        weights = train_hata_weights(
            captured,
            bits=bits,
            recipe=HataRecipe(steps=steps, **recipe),
            seed=seed,
            progress=progress,
        )
        return cls(weights, key_norm, trained=steps > 0)

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": int32 (B, KV heads, n, bits / 32)} of keys (B, KV heads, n, D), and float16
        "norms" (B, KV heads, n, 1) if key_norm."""
        maps = self._maps_of(layer, keys.device)
        codes = torch.cat([encode(part, maps) for part in keys.split(TOKENS_AT_ONCE, 2)], dim=2)
        return self._index(codes, keys)

    def encode_queries(self, layer: int, queries: Tensor, view: KeyView | None = None) -> Tensor:
        """Codes int32 (B, heads, q, bits / 32) of queries (B, heads, q, D)."""
        maps = self._maps_of(layer, queries.device)
        codes = encode(self._by_kv_head(maps, queries), maps)
        return codes.reshape(*queries.shape[:3], -1)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Matching bits, int32 (B, KV heads, q, n); float32 and weighted if key_norm."""
        matching = super().scores(layer, queries, view, scaling)
        if not self.key_norm:
            return matching
        group = queries.shape[1] // view.keys.shape[1]
        # sum_g (1 - 2 d_g / bits) with d_g = bits - matching_g
        similarity = 2 * matching.float() / self.bits - group
        return similarity * view.index["norms"].float().mT

    def _shard(self, part: HeadSlice) -> HATASelector:
        return self._with(weights=part.of_layers(self.weights), _maps={})

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """bits, and 16 for a key norm."""
        return float(self.bits + NORM_BITS * self.key_norm)

    def parameters(self) -> dict[str, Any]:
        """The weights' bits, and key_norm."""
        return {"bits": self.bits} | super().parameters()

    def weights_sha256(self) -> str:
        """Of the weights of all layers."""
        return tensors_sha256(self.weights)

    def _index(self, codes: Tensor, keys: Tensor) -> dict[str, Tensor]:
        if not self.key_norm:
            return {"codes": codes}
        return {"codes": codes, "norms": keys.float().norm(dim=-1, keepdim=True).half()}

    def _maps_of(self, layer: int, device: torch.device) -> Maps:
        """The layer's hash on a device, as a linear map of the kernels without a bias."""
        if layer not in self.weights:
            raise ValueError(
                f"layer {layer} has no hash weights, only {sorted(self.weights)}; "
                "train on a capture of it, or make it a dense layer"
            )
        key = (layer, device)
        if key not in self._maps:
            weight = self.weights[layer].to(device)
            self._maps[key] = Maps((weight,), (torch.zeros_like(weight[:, 0]),))
        return self._maps[key]

    @staticmethod
    def _by_kv_head(maps: Maps, queries: Tensor) -> Tensor:
        """Queries (B, heads, q, D) as (B, KV heads, group * q, D), each to its map."""
        batch, _, _, dim = queries.shape
        return queries.reshape(batch, maps.heads, -1, dim)

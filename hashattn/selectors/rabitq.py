"""RaBitQ (Gao and Long 2024): signs of randomly rotated keys against the query as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.hashing.maps import LayerMaps
from hashattn.hashing.transform import calibrate_rotation, quantise
from hashattn.kernels import pack_bits, tokens_of
from hashattn.selectors.base import KeyView
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer

FACTOR_BITS = 16
# of a key, before its directions are quantised: the one that turns it the least is kept
_SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0)


@dataclass(frozen=True, eq=False)
class RaBitQSelector(HashSelector):
    """score = q.x, x the rotated, centred key quantised to 1 to 4 bits a direction.

    weights: a random rotation (`calibrate`), which is hash weights like any other. Without `factor`
    levels are the same for all keys. factor: each key o, of any size, is quantised as of size 1 and
    keeps |o|^2 / (o.x), float16, which makes q.x unbiased over rotations (arXiv 2405.12497, theorem
    3.2; for more bits a direction arXiv 2409.09913). Queries are not quantised but graded as a
    hash's are; with a factor they are real. Directions fewer or more than the head's channels:
    SimHash with orthogonal planes and a real query, the best form of `lsh`.
    """

    name = "rabitq"
    style = MethodStyle("#b5179e", (5, 0, 0), "RaBitQ")
    needs = "calibration"

    factor: bool = False

    @classmethod
    def calibrate(
        cls,
        captured: Iterable[CapturedLayer],
        planes: int | None = None,
        digits: int = 1,
        factor: bool = False,
        seed: int = 0,
    ) -> RaBitQSelector:
        """On the captured layers of some sequences; see hashing.calibrate_rotation."""
        weights = calibrate_rotation(captured, planes=planes, digits=digits, seed=seed)
        return cls(weights, factor=factor)

    @classmethod
    def usual(cls, context: UsualContext) -> RaBitQSelector:
        """A bit for each channel, with the factor, calibrated on the comparison's captures."""
        return cls.calibrate(context.calibrated, factor=True, seed=context.seed)

    @property
    def by_codes(self) -> bool:
        """False with a factor."""
        return not self.factor and super().by_codes

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": int32 (B, KV heads, n, words)}, and {"factor": float16 (B, KV heads, n, 1)}."""
        if not self.factor:
            return super().encode_keys(layer, keys)
        digits = self.weights.config.folds + 1
        maps = self.weights.layer(layer, keys.device)
        rotated = LayerMaps(replace(maps.key, steps=None), maps.query).preactivations_keys(keys)
        rotated = rotated[..., ::digits]
        size = rotated.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        levels = self._levels(maps)[:, None, None]  # (KV heads, 1, 1, digits)
        best, signs = torch.full_like(size, -1.0), None
        for scale in _SCALES:
            tried = quantise(rotated * (scale / size), levels.unbind(-1))
            quantised = (tried * levels).sum(-1)
            along = (rotated * quantised).sum(-1, keepdim=True)
            cosine = along / (quantised.norm(dim=-1, keepdim=True) * size)
            better = cosine > best
            best = torch.where(better, cosine, best)
            signs = tried if signs is None else torch.where(better[..., None], tried, signs)
        along = (rotated * (signs * levels).sum(-1)).sum(-1, keepdim=True).clamp_min(1e-12)
        factor = rotated.square().sum(-1, keepdim=True) / along
        return {"codes": pack_bits(signs.flatten(-2)), "factor": factor.half()}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Matching weights of bits, int32 (B, lists, q, n), or the estimate of q.k, float32."""
        if not self.factor:
            return super().scores(layer, queries, view, scaling)
        estimate = self._weighted(layer, queries, view)
        factor = tokens_of(view.index["factor"]).float().mT
        lists = estimate.shape[1]
        return estimate * factor.repeat_interleave(lists // factor.shape[1], dim=1)

    def _levels(self, maps: LayerMaps) -> Tensor:
        """What the digits of a direction weigh against one another, (KV heads, digits)."""
        config = self.weights.config
        digits = maps.query.weights[0][:: config.group, :, : config.folds + 1]
        return digits.norm(dim=1)  # a query's map is the rotation times the weights

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """A code's bits, and 16 of the factor."""
        return super().auxiliary_bits(group, head_dim) + (FACTOR_BITS if self.factor else 0)

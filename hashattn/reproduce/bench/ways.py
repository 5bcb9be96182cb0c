"""The ways to choose tokens that are timed: this package's default, its options, and the paper's.

`HashSelector(weights)` is "default": digits of components (TrainRecipe.default()), graded by the
query, and a list of tokens for each query head. Every way keeps one code per token and KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hashattn.base.checks import require
from hashattn.base.layout import Layout
from hashattn.hashing.maps import HashConfig, LayerMaps, grades, random_maps
from hashattn.hashing.recipe import TrainRecipe
from hashattn.kernels import Grades

_DEFAULT, _SIGNS = TrainRecipe.default().shape, TrainRecipe.signs().shape


@dataclass(frozen=True)
class Shape:
    """Attention heads of one layer, Llama-3.1-8B's by default.

    Raises ValueError unless query_heads is a multiple of kv_heads.
    """

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        valid = self.kv_heads >= 1 and self.query_heads % self.kv_heads == 0
        allowed = f"a multiple of kv_heads = {self.kv_heads}"
        require(valid, "query_heads", self.query_heads, allowed)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class Way:
    """How a step chooses its tokens.

    scoring: "graded", bits weighed by the query, or "hamming", matching bits. layout: a list of
    tokens "per_query_head" or "per_kv_head". bits: of a code. sampled: which part of the heavy
    tokens is drawn (Budget.sampled). depth, hidden, folds: of the maps (HashConfig).
    """

    scoring: str = "graded"
    layout: Layout = "per_query_head"
    bits: int = 32
    sampled: float = 0.0
    depth: int = _DEFAULT["depth"]
    hidden: int = 128
    folds: int = _DEFAULT["folds"]

    @property
    def grades(self) -> Grades | None:
        """As `kernels.decode_step` takes them."""
        return Grades(**grades(self.bits)) if self.scoring == "graded" else None

    @property
    def codes(self) -> dict[str, Any]:
        """Fields of HashConfig that decide what is stored: ways that share them share codes."""
        fields = ("bits", "depth", "hidden", "folds")
        return {field: getattr(self, field) for field in fields}

    def lists(self, shape: Shape) -> int:
        """Token lists of a layer."""
        return shape.query_heads if self.layout == "per_query_head" else shape.kv_heads

    def maps(self, shape: Shape, seed: int, precision: str = "bfloat16") -> LayerMaps:
        """Random maps; precision "bfloat16" rounds them, as trained ones are."""
        config = HashConfig((0,), shape.query_heads, shape.kv_heads, shape.head_dim, **self.codes)
        maps = random_maps(config, torch.Generator().manual_seed(seed))
        return maps.rounded() if precision == "bfloat16" else maps


DEFAULT = "default"
WAYS = {
    DEFAULT: Way(),
    "default_kv_lists": Way(layout="per_kv_head"),
    "default_drawn": Way(sampled=1 / 2),
    "default_64": Way(bits=64),
    "default_64_drawn": Way(bits=64, sampled=1 / 2),
    "paper": Way("hamming", **_SIGNS),
    "paper_kv_lists": Way("hamming", "per_kv_head", **_SIGNS),
}

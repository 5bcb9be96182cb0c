"""Hash maps: small feed-forward networks from post-RoPE keys or queries to pre-activations.

A bit of a code is 1 where the pre-activation is positive (HashAttention, sections 1.1 and 1.2 of
the algorithm: phi(x) = relu(sign(F(x)))). All heads of a layer are stacked, so a layer is two
batched matrix products per linear stage, whatever the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.base.layout import LAYOUTS, Layout
from hashattn.kernels import ACTIVATIONS, Maps, preactivations
from hashattn.models.heads import HeadSlice


def grades(bits: int) -> dict[str, int]:
    """Digits of a query's weights and the most that they sum to: levels that a byte holds, where
    that costs 1 % of the output error at most, else four times as many, or four a bit."""
    return (
        {"planes": 5, "most": 255} if bits <= 64 else {"planes": 6, "most": max(1024, 4 * bits) - 1}
    )


@dataclass(frozen=True)
class HashConfig:
    """Shapes of all hash maps of a model.

    layout: "per_kv_head" (one key map per KV head, scores summed over the group) or
        "per_query_head" (the paper's code: one key map per query head).
    bits: bits per code, a multiple of 32.  depth: linear stages, 1 to 3 (the paper's have 3).
    hidden: width between stages.  folds: of the key maps' pre-activations, 0 to 3, so that up to
        1 + folds bits are digits of one component (transform codes); the paper's have none.
    layers: indices of the model layers that have maps.
    Raises ValueError naming the field, its value and what is allowed.
    """

    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    layout: Layout = "per_kv_head"
    bits: int = 32
    depth: int = 2
    hidden: int = 128
    activation: str = "silu"
    folds: int = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "layers", tuple(map(index, self.layers)))
        except TypeError:  # no list, or of what is no integer
            require(False, "layers", self.layers, "a list of layer indices")
        rules = {
            "layers": (
                bool(self.layers)
                and len(set(self.layers)) == len(self.layers)
                and min(self.layers) >= 0,
                "distinct non-negative layer indices, at least one",
            ),
            "query_heads": (is_count(self.query_heads), "a positive integer"),
            "kv_heads": (
                is_count(self.kv_heads)
                and is_count(self.query_heads)
                and self.query_heads % self.kv_heads == 0,
                f"a divisor of query_heads ({self.query_heads})",
            ),
            "head_dim": (is_count(self.head_dim), "a positive integer"),
            "layout": (self.layout in LAYOUTS, " or ".join(LAYOUTS)),
            "bits": (is_count(self.bits) and self.bits % 32 == 0, "a positive multiple of 32"),
            "depth": (is_count(self.depth, most=3), "1, 2 or 3"),
            "hidden": (is_count(self.hidden), "a positive integer"),
            "folds": (is_count(self.folds, 0, 3), "0 to 3"),
            "activation": (self.activation in ACTIVATIONS, " or ".join(ACTIVATIONS)),
        }
        for field, (valid, allowed) in rules.items():
            require(valid, field, getattr(self, field), allowed)

    def record(self) -> dict[str, Any]:
        """All fields, as hash_config.json has them; folds only if there are any."""
        fields = asdict(self)
        return fields if self.folds else {k: v for k, v in fields.items() if k != "folds"}

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def key_maps(self) -> int:
        """Key maps per layer: KV heads or query heads, by layout."""
        return self.kv_heads if self.layout == "per_kv_head" else self.query_heads

    @property
    def grades(self) -> dict[str, int]:
        """How finely a query's weights are graded, as `kernels.grade_bits` takes it."""
        return grades(self.bits)

    @property
    def words(self) -> int:
        """int32 words per code."""
        return self.bits // 32

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the stages' ends: head_dim, hidden ..., bits."""
        return (self.head_dim, *[self.hidden] * (self.depth - 1), self.bits)


@dataclass(frozen=True, eq=False)
class HashMap(Maps):
    """One stacked feed-forward map: weights[s] (heads, in, out), biases[s] (heads, out)."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., heads, n, head_dim) to pre-activations (..., heads, n, bits), in float32."""
        return preactivations(x, self)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names ("0.weight", "0.bias", "1.weight", ...) and tensors, in a fixed order."""
        for stage, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            yield f"{stage}.weight", weight
            yield f"{stage}.bias", bias
        if self.steps is not None:
            yield "steps", self.steps

    def to(self, device: torch.device | str) -> HashMap:
        """The same map on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def shard(self, part: HeadSlice) -> HashMap:
        """The maps of a part of the heads."""
        return self._each(part.of)

    def _each(self, change: Callable[[Tensor], Tensor]) -> HashMap:
        steps = None if self.steps is None else change(self.steps)
        weights, biases = (tuple(map(change, part)) for part in (self.weights, self.biases))
        return replace(self, weights=weights, biases=biases, steps=steps)

    def fold_input(self, mean: Tensor, std: Tensor) -> HashMap:
        """The map of x that equals this map of (x - mean) / std; mean, std (heads, in)."""
        first = self.weights[0] / std[..., None]
        shift = self.biases[0] - (mean[:, None] @ first)[:, 0]
        return self._with_first(first, shift)

    def unfold_input(self, mean: Tensor, std: Tensor) -> HashMap:
        """The inverse of `fold_input`, up to float rounding: the map of (x - mean) / std that
        equals this map of x; mean, std (heads, in)."""
        shift = self.biases[0] + (mean[:, None] @ self.weights[0])[:, 0]
        return self._with_first(self.weights[0] * std[..., None], shift)

    def _with_first(self, weight: Tensor, bias: Tensor) -> HashMap:
        weights, biases = (weight, *self.weights[1:]), (bias, *self.biases[1:])
        return replace(self, weights=weights, biases=biases)


@dataclass(frozen=True)
class LayerMaps:
    """The key map and the query map of one layer.

    Queries have a map per head: `query(x)`. Keys may be read by several maps per head, which
    `preactivations_keys` and the kernels' `encode` see to.
    """

    key: HashMap
    query: HashMap

    @property
    def grades(self) -> dict[str, int]:
        """As of HashConfig."""
        return grades(self.key.bits)

    def preactivations_keys(self, keys: Tensor) -> Tensor:
        """keys (..., kv_heads, n, head_dim) to (..., key_maps, n, bits).

        Query head h reads KV head h // group, so with one map per query head each KV head's
        keys are read by `group` maps.
        """
        repeat = self.key.weights[0].shape[0] // keys.shape[-3]
        return self.key(keys.repeat_interleave(repeat, -3) if repeat > 1 else keys)

    def to(self, device: torch.device | str) -> LayerMaps:
        """The same maps on another device."""
        return LayerMaps(self.key.to(device), self.query.to(device))

    def shard(self, part: HeadSlice) -> LayerMaps:
        """The maps of a part of the heads: key maps by KV head or query head, as they are."""
        return LayerMaps(self.key.shard(part), self.query.shard(part))

    def rounded(self) -> LayerMaps:
        """The same maps with weights rounded to bfloat16."""
        return LayerMaps(self.key.rounded(), self.query.rounded())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names ("key.0.weight", ..., "query.2.bias") and tensors, in a fixed order."""
        for side in ("key", "query"):
            for name, tensor in getattr(self, side).tensors():
                yield f"{side}.{name}", tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: HashConfig) -> LayerMaps:
        """Inverse of `tensors`; KeyError for a name that is missing."""

        def side(name: str) -> HashMap:
            weights, biases = (
                tuple(tensors[f"{name}.{stage}.{kind}"] for stage in range(config.depth))
                for kind in ("weight", "bias")
            )
            return HashMap(weights, biases, config.activation, tensors.get(f"{name}.steps"))

        return cls(side("key"), side("query"))


def expected_shapes(config: HashConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one layer, by the names of `LayerMaps.tensors`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for side, heads in (("key", config.key_maps), ("query", config.query_heads)):
        for stage, (fan_in, fan_out) in enumerate(
            zip(config.widths, config.widths[1:], strict=False)
        ):
            shapes[f"{side}.{stage}.weight"] = (heads, fan_in, fan_out)
            shapes[f"{side}.{stage}.bias"] = (heads, fan_out)
    if config.folds:
        shapes["key.steps"] = (config.key_maps, config.folds, config.bits)
    return shapes


def random_maps(config: HashConfig, generator: torch.Generator) -> LayerMaps:
    """Maps drawn like torch's default Linear: uniform within 1/sqrt(fan_in) (the official code)."""
    tensors = {}
    for name, shape in expected_shapes(config).items():
        part = name.split(".")[1]
        bound = config.widths[config.depth - 1 if part == "steps" else int(part)] ** -0.5
        tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return LayerMaps.from_tensors(tensors, config)

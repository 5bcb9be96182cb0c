"""A selector on top of another one, which stores what is needed of the keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from hashattn.selectors.base import NORM_BITS, IndexStore, KeyView, Selector

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice


@dataclass(frozen=True, eq=False)
class WrapperSelector(Selector):
    """Encodes, observes and scores as `base`; subclasses select in their own way.

    It has the base's traits: layout, trained, needs, sparse, kernel, evicts, observes.
    """

    ranks = False

    base: Selector = field(repr=False)

    def __post_init__(self) -> None:
        traits = ("layout", "trained", "needs", "sparse", "kernel", "evicts", "observes")
        self._settle(**{name: getattr(self.base, name) for name in traits})

    def _shard(self, part: HeadSlice) -> Self:
        return self._with(base=self.base.shard(part))

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """The base's, of keys (B, KV heads, n, D): token axis 2."""
        return self.base.encode_keys(layer, keys)

    def encode_values(self, layer: int, values: Tensor) -> dict[str, Tensor]:
        """The base's and the wrapper's own, of values (B, KV heads, n, Dv): token axis 2."""
        return super().encode_values(layer, values) | self.base.encode_values(layer, values)

    def new_store(self, name: str, part: Tensor) -> IndexStore:
        """The base's, for its part (batch, heads, new, ...)."""
        return self.base.new_store(name, part)

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the base remembers after queries (B, heads, q, D): token axis 2."""
        return self.base.observe(layer, queries, view, scaling, read)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """The base's (B, lists, q, n)."""
        return self.base.scores(layer, queries, view, scaling)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """As the base, and a value norm where only the wrapper stores one."""
        return self.base.auxiliary_bits(group, head_dim) + self._added_bits

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """As the base, and a value norm where only the wrapper needs one."""
        return self.base.nominal_bits(group, head_dim) + self._added_bits

    @property
    def _added_bits(self) -> int:
        return NORM_BITS * (self.value_norms and not self.base.value_norms)

    def read_bits(self, group: int, head_dim: int) -> float:
        """As the base; what the wrapper reads of single tokens is not counted."""
        return self.base.read_bits(group, head_dim)

    def parameters(self) -> dict[str, Any]:
        """The wrapper's settings and the base's record."""
        return super().parameters() | {"base": self.base.record()}

    @property
    def learned_length(self) -> int | None:
        """The base's."""
        return self.base.learned_length

    def weights_sha256(self) -> str | None:
        """The base's."""
        return self.base.record()["weights_sha256"]

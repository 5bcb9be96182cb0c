"""Which of a model's heads a process holds under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.base.errors import UnsupportedModelError

Heads = TypeVar("Heads", Tensor, tuple)


@dataclass(frozen=True)
class HeadSlice:
    """The heads of process `rank` of `ranks`, of a model with query_heads and kv_heads in all.

    Tensor parallelism gives every process equally many neighbouring heads, in order of rank, in
    whole groups: a KV head with all its query heads. Raises ValueError for a rank outside
    0..ranks - 1, UnsupportedModelError for KV heads that cannot be divided so.
    """

    query_heads: int
    kv_heads: int
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        valid = is_count(self.rank, 0, self.ranks - 1)
        require(valid, "rank", self.rank, f"an integer in 0..{self.ranks - 1}")
        if self.kv_heads % self.ranks:
            divisors = [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]
            raise UnsupportedModelError(
                f"{self.kv_heads} KV heads cannot be shared evenly by {self.ranks} processes: "
                f"start {' or '.join(map(str, divisors))} (torchrun --nproc-per-node), or spread "
                'layers over GPUs in one process (device_map="auto")'
            )

    @property
    def query(self) -> range:
        """Numbers of the query heads held, as the model counts them."""
        return self._range(self.query_heads)

    @property
    def kv(self) -> range:
        """Numbers of the KV heads held, as the model counts them."""
        return self._range(self.kv_heads)

    def of(self, heads: Heads) -> Heads:
        """The held part of a tensor (query_heads or kv_heads, ...), or of a tuple of that length.

        ValueError for another length.
        """
        if len(heads) not in (self.query_heads, self.kv_heads):
            raise ValueError(
                f"made for {len(heads)} heads, the model has {self.query_heads} query heads and "
                f"{self.kv_heads} KV heads: train or calibrate it for this model"
            )
        held = self._range(len(heads))
        return heads[held.start : held.stop]

    def of_layers(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """`of` every layer's tensor."""
        return {layer: self.of(tensor) for layer, tensor in tensors.items()}

    def record(self) -> dict[str, Any]:
        """For receipts, as JSON: numbers of the heads held, and how many the model has."""
        return {
            "rank": self.rank,
            "ranks": self.ranks,
            "query": list(self.query),
            "query_heads": self.query_heads,
            "kv": list(self.kv),
            "kv_heads": self.kv_heads,
        }

    def _range(self, heads: int) -> range:
        share = heads // self.ranks
        return range(self.rank * share, (self.rank + 1) * share)


def gathered(tensor: Tensor) -> Tensor:
    """A whole parameter: one that is sharded over processes is gathered from all of them.

    Every process has to call this.
    """
    # not isinstance: DTensor cannot be imported where torch is built without distributed
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

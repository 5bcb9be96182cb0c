"""Dense attention: the baseline that reads every cached token."""

from dataclasses import dataclass

from torch import Tensor

from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.usual import MethodStyle


@dataclass(frozen=True, eq=False)
class DenseSelector(Selector):
    """Reads everything: attention stays the model's own, and is only counted.

    kernel: decode steps on a CPU go through this package's `dense_decode` instead, which is faster
    than torch's attention there: the fair baseline for speed.
    """

    name = "dense"
    style = MethodStyle("#000000", "s", "dense")
    sparse = False

    kernel: bool = False

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Equal scores (B, KV heads, q, n): dense attention has no preference."""
        batch, kv_heads, n, _ = view.keys.shape
        return queries.new_zeros(batch, kv_heads, queries.shape[2], n)

"""Dense attention: the baseline that reads every cached token."""

from typing import Any

from torch import Tensor

from hashattn.selectors.base import KeyView, Selector


class DenseSelector(Selector):
    """Reads everything; attention stays the model's own and is only counted.

    kernel: decode steps on a CPU go through this package's `dense_decode` instead, which is faster
    there than torch's attention: the fair baseline for speed.
    """

    name = "dense"
    sparse = False

    def __init__(self, kernel: bool = False) -> None:
        self.kernel = kernel

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Equal scores: dense attention has no preference."""
        batch, kv_heads, n, _ = view.keys.shape
        return queries.new_zeros(batch, kv_heads, queries.shape[2], n)

    def record(self) -> dict[str, Any]:
        """Method and parameters; weights_sha256 None."""
        return {"name": self.name, "parameters": {"kernel": self.kernel}, "weights_sha256": None}

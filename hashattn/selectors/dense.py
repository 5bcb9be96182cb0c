"""Dense attention: the baseline that reads every cached token."""

from torch import Tensor

from .base import KeyView, Selector


class DenseSelector(Selector):
    """Reads everything; attention stays the model's own and is only counted."""

    name = "dense"
    sparse = False

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Equal scores: dense attention has no preference."""
        batch, kv_heads, n, _ = view.keys.shape
        return queries.new_zeros(batch, kv_heads, queries.shape[2], n)

"""H2O (Zhang et al. 2023): keep the heavy hitters, the tokens that gathered the most attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.kernels import indices_to_mask
from hashattn.selectors.base import KeyView
from hashattn.selectors.observed import ObservingSelector, attention_by_rows
from hashattn.selectors.usual import MethodStyle

EVICTED = float("-inf")


@dataclass(frozen=True, eq=False)
class H2OSelector(ObservingSelector):
    """score(token) = sum of softmax(scaling q.k) over the queries since it came, group mean.

    After the prefill, each call keeps what its last row read: sink, local and the best heavy
    tokens. The others are evicted, gather nothing more and never return; a token that leaves the
    local window competes with the attention it has gathered. Rows of one call choose from what was
    kept before it. A dense call reads all that is cached, evicted tokens included.
    """

    name = "h2o"
    style = MethodStyle("#882255", "<", "H2O")
    evicts = True

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{"gathered": (B, KV heads, n) float32}, -inf for evicted tokens."""
        gathered = self.gathered(view, attention_by_rows(queries, view, scaling, read))
        if read is not None:
            kept = indices_to_mask(read[:, :, -1:], gathered.shape[2])[:, :, 0]
            gathered = gathered.masked_fill(~kept, EVICTED)
        return {"gathered": gathered}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Attention gathered before this call, (B, KV heads, q, n) float32; -inf once evicted."""
        gathered = self.remembered(view, "gathered", 0.0)
        return gathered[:, :, None].expand(-1, -1, queries.shape[2], -1)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """The float32 sum, in which -inf marks evicted tokens."""
        return 32.0

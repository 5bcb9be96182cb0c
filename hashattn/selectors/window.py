"""StreamingLLM (Xiao et al. 2024): sink and local tokens only."""

from typing import Any

import torch
from torch import Tensor

from hashattn.selectors.base import KeyView, Selector


class WindowSelector(Selector):
    """Selects no heavy token: what remains is the budget's sink and local tokens.

    That is StreamingLLM (in METHODS also "streaming_llm"), which evicts every other token; it reads
    keys with the positions they were cached with, where StreamingLLM counts them within its window.
    """

    name = "window"
    evicts = True

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """-inf for every token, which `select` never takes."""
        batch, kv_heads, n, _ = view.keys.shape
        shape = (batch, kv_heads, queries.shape[2], n)
        return torch.full(shape, -torch.inf, device=queries.device)

    def record(self) -> dict[str, Any]:
        """Name, and that it evicts as StreamingLLM does."""
        return super().record() | {"parameters": {"method": "streaming_llm"}, "evicts": True}

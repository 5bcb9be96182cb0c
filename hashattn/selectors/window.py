"""Sink and local tokens only (StreamingLLM, Xiao et al. 2024)."""

import torch
from torch import Tensor

from .base import KeyView, Selector


class WindowSelector(Selector):
    """Selects no heavy token: what remains is the budget's sink and local tokens."""

    name = "window"

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """-inf for every token, which `select` never takes."""
        batch, kv_heads, n, _ = view.keys.shape
        shape = (batch, kv_heads, queries.shape[2], n)
        return torch.full(shape, -torch.inf, device=queries.device)

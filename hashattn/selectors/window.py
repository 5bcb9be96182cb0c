"""StreamingLLM (Xiao et al. 2024): sink and local tokens only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.usual import MethodStyle


@dataclass(frozen=True, eq=False)
class WindowSelector(Selector):
    """Selects no heavy token: what remains is the budget's sink and local tokens.

    That is StreamingLLM, which evicts every other token, but for positions: keys keep those they
    were cached with, where StreamingLLM counts within its window.
    """

    name = "window"
    style = MethodStyle("#e69f00", "P", "sink + local")
    evicts = True

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """-inf for every token, which `select` never takes: float32 (B, KV heads, q, n)."""
        batch, kv_heads, n, _ = view.keys.shape
        shape = (batch, kv_heads, queries.shape[2], n)
        return torch.full(shape, -torch.inf, device=queries.device)

    def parameters(self) -> dict[str, Any]:
        """The published method's name."""
        return {"method": "streaming_llm"}

    def record(self) -> dict[str, Any]:
        """Also whether it evicts."""
        return super().record() | {"evicts": self.evicts}


@dataclass(frozen=True, eq=False)
class StreamingLLMSelector(WindowSelector):
    """The same under the published method's name, for tables and figures that hold both."""

    style = MethodStyle("#ddcc77", "h", "StreamingLLM")

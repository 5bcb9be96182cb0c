"""Which cached tokens a query row may see, must read, and may choose from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget


@dataclass(frozen=True)
class TokenSets:
    """always and candidates: (batch or 1, 1, q, n) bool, disjoint; their union is visible.

    heavy: (batch or 1, q) int64, tokens to choose. visible: (batch or 1, q) int64, tokens seen.
    """

    always: Tensor
    candidates: Tensor
    heavy: Tensor
    visible: Tensor


def visible_tokens(mask: Tensor | None, q_len: int, n: int, device: torch.device) -> Tensor:
    """(batch or 1, 1, q, n) bool from transformers' boolean mask; None means causal."""
    if mask is not None:
        return mask[..., :n]
    tokens = torch.arange(n, device=device)
    return (tokens <= torch.arange(n - q_len, n, device=device)[:, None])[None, None]


def token_sets(visible: Tensor, budget: Budget) -> TokenSets:
    """Sink and local tokens counted over each row's visible tokens, the rest candidates."""
    rank = visible.cumsum(dim=-1, dtype=torch.int32)  # 1 = first visible token
    count = rank[..., -1:]
    fixed = (rank <= budget.sink) | (rank > count - budget.local)
    count = count[:, 0, :, 0].to(torch.int64)
    return TokenSets(
        always=visible & fixed,
        candidates=visible & ~fixed,
        heavy=budget.heavy_tokens(count),
        visible=count,
    )

"""For methods that decide from attention they saw: its weights, and their state by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hashattn.kernels import indices_to_mask
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.logits import inner_products

WEIGHTS_AT_ONCE = 1 << 24  # bounds the float attention matrix of a long prefill, in elements


@dataclass(frozen=True, eq=False)
class ObservingSelector(Selector):
    """A selector that ranks by what `observe` remembered, once for each KV head.

    Attention is observed as softmax(scaling q.k), without the logit cap or the learned sinks that
    some models have. Cropping a cache drops the state of cropped tokens, not what their queries
    added to others: an eviction stands.
    """

    layout = "per_kv_head"
    observes = True

    def remembered(self, view: KeyView, name: str, fill: float) -> Tensor:
        """State `name` (B, heads, n, ...), `fill` for tokens that have not been observed.

        ValueError where nothing was observed.
        """
        if name not in view.index:
            raise ValueError(
                f"selector {self.name!r} decides from the attention it saw, and it saw none: call "
                "observe with the prompt's queries first"
            )
        return extended(view.index[name], view.keys.shape[2], fill)

    def gathered(self, view: KeyView, weights: Iterable[Tensor]) -> Tensor:
        """State "gathered" (B, KV heads, n), zero at first, plus the attention of every row of
        `weights` (B, KV heads, rows, n)."""
        if "gathered" in view.index:
            total = self.remembered(view, "gathered", 0.0)
        else:
            total = torch.zeros(view.keys.shape[:3], device=view.keys.device)
        for rows in weights:
            total += rows.sum(dim=2)
        return total

    def record(self) -> dict[str, Any]:
        """Also whether it evicts."""
        return super().record() | {"evicts": self.evicts}


def extended(state: Tensor, n: int, fill: float) -> Tensor:
    """A copy of state (B, heads, tokens, ...) with n tokens, `fill` for the new ones."""
    shape = (*state.shape[:2], n - state.shape[2], *state.shape[3:])
    return torch.cat([state, state.new_full(shape, fill)], dim=2)


def attention_by_rows(
    queries: Tensor,
    view: KeyView,
    scaling: float,
    read: Tensor | None = None,
    window: int | None = None,
) -> Iterator[Tensor]:
    """Attention (B, KV heads, rows, n) float32 of a few query rows at a time, group means.

    queries (B, heads, q, D). The softmax is over what a row reads: its `read` tokens (B, KV heads,
    q, m) int32, -1 padded, or all it sees, of these the last `window` if given. Rows that are
    padding, or see nothing, are zero.
    """
    batch, heads, q_len, _ = queries.shape
    n = view.keys.shape[2]
    positions, places = view.query_positions(q_len), view.places[:, None, None]
    real = view.real_queries(q_len)[:, None, :, None]
    for rows in torch.arange(q_len).split(max(1, WEIGHTS_AT_ONCE // (batch * heads * n))):
        at = positions[rows]
        allowed = replace(view, positions=at).causal(len(rows)) & real[:, :, rows]
        if read is not None:
            allowed = allowed & indices_to_mask(read[:, :, rows], n)
        if window is not None:
            allowed = allowed & (places > places[..., at].mT - window)
        yield _weights(queries[:, :, rows], view.keys, scaling, allowed)


def _weights(queries: Tensor, keys: Tensor, scaling: float, allowed: Tensor) -> Tensor:
    logits = (inner_products(queries, keys) * scaling).unflatten(1, (keys.shape[1], -1))
    allowed = allowed[:, :, None]
    # the lowest finite value, not -inf: a row of padding sees nothing and would become NaN
    weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(dim=-1)
    return (weights * allowed).mean(dim=2)

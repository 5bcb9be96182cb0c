"""SnapKV (Li et al. 2024): the prompt's last queries vote once for the tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from hashattn.base.checks import require, require_one_of
from hashattn.kernels import indices_to_mask
from hashattn.selectors.base import KeyView
from hashattn.selectors.observed import ObservingSelector, attention_by_rows, extended
from hashattn.selectors.usual import MethodStyle

_POOLS = {"max": max_pool1d, "avg": avg_pool1d}
EVICTED = float("-inf")


@dataclass(frozen=True, eq=False)
class SnapKVSelector(ObservingSelector):
    """rank(token) = pool(sum over the last `window` prompt queries of softmax(scaling q.k)).

    The votes for the prefix before the window, group means, are pooled over `kernel` tokens ("max"
    or "avg", zeros beyond the prefix); the window itself ranks above it. The first sparse call
    keeps what its last row reads, sink, local and the best heavy tokens, and evicts the rest;
    tokens generated later stay readable while they are local. Several tokens of one sparse call are
    a prompt's question and rank with the window. A later dense call, the next turn's prompt, votes
    again among the tokens that are left.
    """

    name = "snapkv"
    style = MethodStyle("#999933", ">", "SnapKV")
    evicts = True

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        window, kernel = self.window, self.kernel
        require(window >= 1, "window", window, "at least 1 query")
        require(kernel >= 1 and kernel % 2, "kernel", kernel, "a positive odd number of tokens")
        require_one_of("pooling", self.pooling, sorted(_POOLS))

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{"rank": (B, KV heads, n) float32}, -inf for evicted tokens; during a prompt also
        "votes" (B, KV heads, n, window) float32 of its last queries, oldest first."""
        n = view.keys.shape[2]
        if read is not None:
            rank_of_new = self._certain if queries.shape[2] > 1 else EVICTED
            rank = self.remembered(view, "rank", rank_of_new)
            kept = indices_to_mask(read[:, :, -1:], n)[:, :, 0]
            return {"rank": rank.masked_fill(~kept, EVICTED)}
        votes = self._votes(queries, view, scaling)
        rank = self._pooled(votes.sum(dim=-1), view.visible)
        if "rank" in view.index:
            evicted = self.remembered(view, "rank", 0.0) == EVICTED
            rank = rank.masked_fill(evicted, EVICTED)
        return {"rank": rank, "votes": votes}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """The ranks, (B, KV heads, q, n) float32; -inf once evicted."""
        rank = self.remembered(view, "rank", self._certain)
        return rank[:, :, None].expand(-1, -1, queries.shape[2], -1)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """The float32 rank, in which -inf marks evicted tokens; votes do not outlive the prompt."""
        return 32.0

    @property
    def _certain(self) -> float:
        """A rank above all votes: each query of the window gives a token at most 1."""
        return self.window + 1.0

    def _votes(self, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Attention (B, KV heads, n, window) that all tokens got from the last `window` queries so
        far, padding left out."""
        batch, kv_heads, n, _ = view.keys.shape
        recent = queries[:, :, -self.window :]
        rows = recent.shape[2]
        positions = view.query_positions(queries.shape[2])[-rows:]
        recent_view = KeyView(view.keys, visible=view.visible, positions=positions)
        votes = torch.cat(list(attention_by_rows(recent, recent_view, scaling)), dim=2).mT
        real = recent_view.real_queries(rows)
        if "votes" in view.index:  # those queries came before the new tokens and gave them nothing
            earlier = extended(view.index["votes"], n, 0.0)
        else:
            earlier = votes.new_zeros(batch, kv_heads, n, self.window)
        real = torch.cat([real.new_ones(len(real), self.window), real], dim=-1)
        # a stable sort puts padding first, so that the last `window` are real
        order = real.long().argsort(dim=-1, stable=True)[:, rows:]
        votes = torch.cat([earlier, votes], dim=-1)
        return votes.gather(-1, order[:, None, None].expand(batch, kv_heads, n, -1))

    def _pooled(self, votes: Tensor, visible: Tensor | None) -> Tensor:
        """Ranks (B, KV heads, n) by votes (B, KV heads, n), the last `window` tokens certain.

        Neighbours are those among the visible tokens, visible (B, n), or None for all.
        """
        if visible is None:
            return self._pooled_in_order(votes)
        order = visible.long().argsort(dim=-1, stable=True)[:, None].expand_as(votes)
        rank = self._pooled_in_order(votes.gather(-1, order))  # invisible tokens first
        return torch.zeros_like(rank).scatter(-1, order, rank)

    def _pooled_in_order(self, votes: Tensor) -> Tensor:
        start = max(0, votes.shape[2] - self.window)  # of the window
        votes[:, :, start:] = 0.0
        rank = _POOLS[self.pooling](votes, self.kernel, stride=1, padding=self.kernel // 2)
        rank[:, :, start:] = self._certain
        return rank

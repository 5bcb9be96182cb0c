"""Over-fetch by a cheap selector, then keep the best by exact attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hashattn.kernels import Codes, Growing, gather_tokens, select
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.choice import Choice


class RerankSelector(Selector):
    """`base` proposes `factor` times the heavy budget; q.k of the proposed tokens decides.

    Reads the keys of all proposed tokens and the values of those that stay, so that a token of the
    budget costs (factor + 1) / 2 times its bytes; density counts tokens attended. Lists per KV head
    add up the attention weights of a group's query heads among the proposed tokens.
    """

    name = "rerank"
    ranks = False

    def __init__(self, base: Selector, factor: int = 4) -> None:
        """Raises ValueError for a factor below 2, or a base whose own selection is no ranking."""
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor = {factor!r} must be an integer of at least 2")
        if not base.ranks:
            raise ValueError(f"base = {base.name!r}: must rank tokens by its scores")
        self.base, self.factor, self.layout = base, factor, base.layout
        self.trained, self.sparse, self.needs = base.trained, base.sparse, base.needs
        self.evicts, self.observes = base.evicts, base.observes

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """As the base."""
        return self.base.encode_keys(layer, keys)

    def encode_step(
        self, layer: int, keys: Tensor, queries: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """As the base."""
        return self.base.encode_step(layer, keys, queries)

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As the base."""
        return self.base.observe(layer, queries, view, scaling, read)

    def new_store(self, name: str, part: Tensor) -> Growing | Codes:
        """As the base."""
        return self.base.new_store(name, part)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """As the base: what proposes."""
        return self.base.scores(layer, queries, view, scaling)

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, choice: Choice
    ) -> Tensor:
        """The best of the proposed tokens by exact attention, and all sink and local ones."""
        fixed = choice.sink + choice.local
        width = max(choice.width, fixed + self.factor * (choice.width - fixed))
        wider = replace(choice, heavy=self.factor * choice.heavy, width=min(width, choice.n))
        proposed = self.base.select(layer, queries, view, scaling, wider)
        weights = self._weights(queries, view.keys, proposed, scaling)
        scores = torch.full((*proposed.shape[:3], choice.n + 1), -torch.inf, device=weights.device)
        slots = torch.where(proposed < 0, choice.n, proposed).long()
        scores.scatter_(-1, slots, weights)
        return select(scores[..., : choice.n], choice.heavy, choice.candidates, choice.always)

    def _weights(self, queries: Tensor, keys: Tensor, proposed: Tensor, scaling: float) -> Tensor:
        """Attention weights among the proposed tokens, summed over a list's query heads."""
        batch, heads, rows, dim = queries.shape
        lists = proposed.shape[1]
        grouped = queries.float().reshape(batch, lists, heads // lists, rows, dim).transpose(2, 3)
        logits = grouped @ gather_tokens(keys, proposed).float().mT * scaling  # (B, L, q, r, m)
        # the lowest finite value, not -inf: a row of padding sees nothing and would become NaN
        unlisted = (proposed < 0)[:, :, :, None]
        logits = logits.masked_fill(unlisted, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1).sum(dim=3)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """As the base."""
        return self.base.auxiliary_bits(group, head_dim)

    def read_bits(self, group: int, head_dim: int) -> float:
        """As the base, to propose; the proposed keys come on top."""
        return self.base.read_bits(group, head_dim)

    def record(self) -> dict[str, Any]:
        """factor and the base's record, whose weights are this method's."""
        base = self.base.record()
        return {
            "name": self.name,
            "parameters": {"factor": self.factor, "base": base},
            "weights_sha256": base["weights_sha256"],
        }

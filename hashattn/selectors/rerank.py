"""Over-fetch with a cheap selector, then keep the best by exact attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.kernels import gather_tokens, select
from hashattn.selectors.base import KeyView
from hashattn.selectors.logits import listed_logits, value_norms
from hashattn.selectors.plan import SelectionPlan
from hashattn.selectors.usual import MethodStyle, UsualContext
from hashattn.selectors.wrapper import WrapperSelector


@dataclass(frozen=True, eq=False)
class RerankSelector(WrapperSelector):
    """`base` proposes `factor` times the heavy budget; q.k of the proposed tokens decides.

    It reads the keys of all proposed tokens and the values of those that stay, so a token of the
    budget costs (factor + 1) / 2 times its bytes; density counts attended tokens. Lists per KV head
    add up the attention weights of a group's query heads among the proposed tokens. value_norms:
    weights times the norms of the values, which are stored. ValueError for a factor below 2, or a
    base whose own selection is no ranking.
    """

    name = "rerank"
    style = MethodStyle("#004488", "H", "HashAttention, re-ranked")

    factor: int = 4
    value_norms: bool = False

    def __post_init__(self) -> None:
        require(is_count(self.factor, 2), "factor", self.factor, "an integer of at least 2")
        ranker = "a method that ranks tokens by its scores"
        require(self.base.ranks, "base", self.base.name, ranker)
        super().__post_init__()

    @classmethod
    def usual(cls, context: UsualContext) -> RerankSelector:
        """Twice the budget, proposed by the hash selector."""
        from hashattn.selectors.hash import HashSelector  # only the usual base needs it

        return cls(HashSelector.usual(context), factor=2)

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (B, lists, q, m) int32, -1 padded: the best of the proposed tokens by exact
        attention, and all sink and local ones."""
        fixed = plan.sink + plan.local
        width = max(plan.width, fixed + self.factor * (plan.width - fixed))
        wider = replace(plan, heavy=self.factor * plan.heavy, width=min(width, plan.n))
        proposed = self.base.select(layer, queries, view, scaling, wider)
        weights = self._weights(queries, view.keys, proposed, scaling)
        scores = torch.full((*proposed.shape[:3], plan.n + 1), -torch.inf, device=weights.device)
        if self.value_norms:
            norms = value_norms(view).repeat_interleave(len(scores[0]) // view.keys.shape[1], dim=1)
            at = proposed.clamp(min=0).long()
            weights = weights * norms.expand(*scores.shape[:3], -1).gather(-1, at)
        slots = torch.where(proposed < 0, plan.n, proposed).long()
        scores.scatter_(-1, slots, weights)
        return select(scores[..., : plan.n], plan.heavy, plan.candidates, plan.mandatory)

    def _weights(self, queries: Tensor, keys: Tensor, proposed: Tensor, scaling: float) -> Tensor:
        """Attention weights among the proposed tokens, both (B, lists, q, m), summed over a list's
        query heads."""
        logits = listed_logits(queries, gather_tokens(keys, proposed)) * scaling
        # the lowest finite value, not -inf: a row of padding sees nothing and would become NaN
        unlisted = (proposed < 0)[:, :, :, None]
        logits = logits.masked_fill(unlisted, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1).sum(dim=3)

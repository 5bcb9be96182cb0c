"""Tokens that every step reads whatever the selector says: passages that must not be dropped.

They are read beside the budget: what the selector chooses is what it would choose without them, and
those of its tokens that are kept anyway are read once. A kept token stands for itself alone, so a
drawn one among them has its correction taken away, and the sample of all others stays unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.base.checks import INT32_MAX, is_count, require
from hashattn.selectors.plan import SelectionPlan

_NOWHERE = INT32_MAX  # the number of a token that pads the shorter rows: no context has it


class Passages:
    """Kept tokens of every prompt of a batch.

    tokens: their numbers in the prompt, in any order; or a sequence of them for each prompt. Tokens
    that a row does not see are not read, padding counts nothing: 0 is a prompt's first token.
    ValueError for anything else, and where nothing is named.
    """

    def __init__(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> None:
        rows = _rows(tokens)
        longest = max(map(len, rows), default=0)
        allowed = "one token number or more of a prompt, or a list for each prompt of a batch"
        require(longest > 0, "tokens", tokens, allowed)
        padded = [row + [_NOWHERE] * (longest - len(row)) for row in rows]
        self.most = longest
        self._tokens = torch.tensor(padded, dtype=torch.int64)

    def merge(
        self, indices: Tensor, log_weights: Tensor | None, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Lists (batch, lists, q, m) int32, ascending and padded with -1, of a plan's rows, and
        their log weights of the same shape or None: both with the kept tokens that a row sees.

        ValueError where the batch is no multiple of the prompts, as that of beams is.
        """
        batch, lists, q_len, _ = indices.shape
        kept = self._cached(plan, batch, indices.device)[:, None].expand(-1, lists, -1, -1)
        slots = plan.n + 1  # the last takes the padding of both
        known = torch.zeros((batch, lists, q_len, slots), dtype=torch.bool, device=indices.device)
        known.scatter_(-1, kept, True)
        chosen = indices.long().remainder(slots)
        chosen = chosen.masked_fill(known.gather(-1, chosen), plan.n)
        merged, order = torch.cat((chosen, kept), -1).sort(dim=-1)
        merged = torch.where(merged < plan.n, merged, -1).to(indices.dtype)
        if log_weights is not None:
            own = log_weights.new_zeros((*log_weights.shape[:-1], kept.shape[-1]))
            log_weights = torch.cat((log_weights, own), -1).gather(-1, order)
        return merged, log_weights

    def _cached(self, plan: SelectionPlan, batch: int, device: torch.device) -> Tensor:
        """Where the kept tokens lie in the cache, (batch, q, k) int64; plan.n for those that a row
        does not see."""
        prompts = len(self._tokens)
        allowed = f"for one prompt, or as many as the {batch} rows of this batch are of"
        require(batch % prompts == 0, "tokens", f"those of {prompts} prompts", allowed)
        tokens = self._tokens.to(device).repeat_interleave(batch // prompts, dim=0)[:, None]
        if plan.spans is not None:
            first, end = plan.spans[..., :1], plan.spans[..., 1:]
            place = tokens + first
            return place.masked_fill(place >= end, plan.n)
        rank = plan.seen[:, 0].cumsum(dim=-1).expand(batch, -1, -1)  # 1 = first visible token
        return torch.searchsorted(rank, tokens.expand(-1, rank.shape[1], -1) + 1)


def _rows(tokens: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Distinct token numbers by prompt, ascending; ValueError for what is none."""
    several = isinstance(tokens, list | tuple) and any(isinstance(t, list | tuple) for t in tokens)
    rows = []
    for row in tokens if several else [tokens]:
        valid = isinstance(row, list | tuple | range)
        valid = valid and all(is_count(token, 0, INT32_MAX - 1) for token in row)
        require(valid, "tokens", row, "token numbers of a prompt, integers of at least 0")
        rows.append(sorted(set(row)))
    return rows

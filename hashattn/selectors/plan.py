"""What a call may choose from: the tokens its query rows see, must read, and how many more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hashattn.kernels import Coins, room_for


def drawn_tokens(heavy: Tensor, share: float | Tensor) -> Tensor:
    """How many of `heavy` tokens are drawn where a share of them is, int64 like them. Rounded in
    float64, as the kernels do."""
    return (heavy.double() * share).round().long()


@dataclass(frozen=True)
class Draw:
    """How a part of a row's heavy tokens is drawn instead of ranked (priority sampling).

    tokens (batch, 1 or lists, q) int64: how many of `heavy` are drawn, on average. coins: which
    random numbers decide. trust: a drawn token counts for at most 1 / trust times what it would in
    a uniform sample, whatever its score. share: the part of `heavy` that `tokens` are, a number or
    float64 (lists, 1).
    """

    tokens: Tensor
    coins: Coins
    trust: float
    share: float | Tensor

    def shares(self, lists: int) -> Tensor:
        """`share` of each list, (lists,) float64."""
        if isinstance(self.share, Tensor):
            return self.share.flatten()
        return torch.full((lists,), self.share, dtype=torch.float64, device=self.tokens.device)


@dataclass(frozen=True)
class SelectionPlan:
    """What may be selected for every query row of a call, the same for all layers of a step.

    n: tokens cached. sink, local: how many of the first and last visible tokens are always read.
    heavy (batch, 1 or lists, q) int64: how many of the others to choose. visible (batch, q) int64:
    how many a row sees. spans (batch, q, 2) int64: the tokens [first, last) that it sees, None if
    they are not one interval. mask (batch or 1, 1, q, n) bool: the same as a mask, None with spans.
    width: the most tokens that a row may read. draw: None where all heavy tokens are ranked.
    """

    n: int
    sink: int
    local: int
    heavy: Tensor
    visible: Tensor
    width: int
    spans: Tensor | None = None
    mask: Tensor | None = None
    draw: Draw | None = None

    @cached_property
    def _parts(self) -> dict[float, Tensor]:
        return {}

    def part(self, share: float) -> Tensor:
        """A share of `heavy` in whole tokens, int64 like it; made once for all layers."""
        if share not in self._parts:
            self._parts[share] = drawn_tokens(self.heavy, share)
        return self._parts[share]

    def with_heavy(self, heavy: Tensor) -> SelectionPlan:
        """The plan with other numbers of heavy tokens (batch, 1 or lists, q), of which the same
        share is drawn."""
        width, draw = self.sink + self.local + (int(heavy.max()) if heavy.numel() else 0), self.draw
        if draw is not None:
            draw = replace(draw, tokens=drawn_tokens(heavy, draw.share))
            width = room_for(0, width)
        return replace(self, heavy=heavy.contiguous(), width=min(self.n, width), draw=draw)

    @cached_property
    def visible_total(self) -> int | Tensor:
        """`visible` summed over batch and rows; a tensor where reading it would wait for a GPU."""
        total = self.visible.sum()
        return int(total) if total.is_cpu else total

    @cached_property
    def seen(self) -> Tensor:
        """Visible tokens, (batch or 1, 1, q, n) bool."""
        if self.mask is not None:
            return self.mask
        tokens = torch.arange(self.n, device=self.spans.device)
        return ((tokens >= self.spans[..., :1]) & (tokens < self.spans[..., 1:]))[:, None]

    @cached_property
    def mandatory(self) -> Tensor:
        """Sink and local tokens, counted over each row's visible ones, bool, shaped like `seen`."""
        rank = self.seen.cumsum(dim=-1, dtype=torch.int32)  # 1 = first visible token
        return self.seen & ((rank <= self.sink) | (rank > rank[..., -1:] - self.local))

    @cached_property
    def candidates(self) -> Tensor:
        """Visible tokens that are not mandatory, bool, shaped like `seen`."""
        return self.seen & ~self.mandatory

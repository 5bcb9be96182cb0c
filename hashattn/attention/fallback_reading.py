"""Reading that grows: the token lists of one call, doubled one by one, each token read once.

The best h tokens contain the best h / 2, so a list that doubles reads only those that it adds, and
outputs over disjoint tokens are merged by their softmax sums. The tokens added last are the lower
half of a list by score, which gives two statistics for nothing:

edge: tokens not read x mean weight of the lower half / weight of all that was read, the weight that
is missed if the next tokens weigh what the last ones did;
change: |o - o'| / |o|, o' the output before the lower half was read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashattn.attention.observer import NO_CLOCK
from hashattn.kernels import LEAST_HEAVY, LOG_LIMIT, mask_to_indices

if TYPE_CHECKING:
    from hashattn.attention.fallback import Fallback
    from hashattn.selectors.plan import SelectionPlan


class Reading:
    """The lists of one call of one layer.

    select: plan -> indices (batch, lists, q, m) int32 of the best tokens (`Selector.select`).
    attend: `kernels.attend` but for the query, keys and values. query (batch, heads, q, D); logits:
    keywords of `attend`. top: the level that is dense. start (lists,) int64: levels to begin with.

    levels (batch, lists, q) int64: how far each list has come, `top` where it reads all that its
    row sees. indices (batch, lists, q, m): all that was read. out (batch, heads, q, Dv): the
    output. new (batch, lists, q): lists that the last read made longer. statistics (batch, heads,
    q, 2): logs of edge and change, meaningful for lists that are new and not dense.
    """

    def __init__(
        self, select: Callable[[SelectionPlan], Tensor], attend: Callable[..., Any], query: Tensor,
        plan: SelectionPlan, logits: dict[str, Any], top: int, start: Tensor, clock: Any = NO_CLOCK,
    ) -> None:  # fmt: skip
        self._select, self._plan, self._top, self._clock = select, plan, top, clock
        self._attend, self._dtype, self._logits = attend, query.dtype, logits
        shape = query.shape[0], len(start), query.shape[2]
        candidates = (plan.visible - plan.sink - plan.local).clamp(min=0)
        self._candidates = candidates[:, None].expand(shape)
        self._visible = plan.visible[:, None].expand(shape)
        self._first = plan.heavy.clamp(min=LEAST_HEAVY).expand(shape)
        self._everything = None
        self.new = torch.ones(shape, dtype=torch.bool, device=query.device)
        self.levels = start[:, None].expand(shape)
        heavy = self._heavy()
        upper = self._best(heavy // 2)
        self._list(heavy)
        self._clock.lap("select")
        out, self._lse = attend(upper, **logits, return_lse=True)
        self._out = out.to(self._lse.dtype)
        self._logits = logits | {"sinks": None}  # they are in the first sum, and count once
        self._read(upper)

    @property
    def out(self) -> Tensor:
        """Attention over `indices`, in the query's dtype."""
        return self._out.to(self._dtype)

    @property
    def dense(self) -> Tensor:
        """Lists that read all their rows see, bool (batch, lists, q)."""
        return self.levels == self._top

    def double(self, which: Tensor) -> None:
        """Double the heavy tokens of lists, bool (batch, lists, q); those that are dense stay."""
        before, self.new = self.indices, which & ~self.dense
        self.levels = self.levels + self.new.long()
        self._list(self._heavy())
        self._clock.lap("select")
        self._read(before)

    @torch.no_grad()
    def _heavy(self) -> Tensor:
        """Heavy tokens (batch, lists, q) of the lists at their levels; levels are `top` from where
        these are all tokens."""
        heavy = torch.minimum(self._first << self.levels, self._candidates)
        self.levels = self.levels.masked_fill(heavy >= self._candidates, self._top)
        return heavy

    @torch.no_grad()
    def _list(self, heavy: Tensor) -> None:
        """Set `indices`: the best `heavy` tokens of each list, or everything."""
        dense = self.dense
        if not dense.any():
            self.indices = self._best(heavy)
            return
        if self._everything is None:
            self._everything = mask_to_indices(self._plan.seen)
        width = self._everything.shape[-1]
        if dense.all():
            self.indices = self._everything.expand(*dense.shape, width).contiguous()
            return
        best = self._best(heavy.masked_fill(dense, 0))
        best = pad(best, (0, width - best.shape[-1]), value=-1)
        self.indices = torch.where(dense[..., None], self._everything, best)

    @torch.no_grad()
    def _best(self, heavy: Tensor) -> Tensor:
        plan = self._plan
        most = int(heavy.max()) if heavy.numel() else 0
        width = min(plan.n, plan.sink + plan.local + most)
        return _trimmed(self._select(replace(plan, heavy=heavy.contiguous(), width=width)))

    def _read(self, before: Tensor) -> None:
        """Read the tokens of `indices` that are not in `before`, and find the statistics."""
        lower = _added(self.indices, before, self._plan.n)
        more, more_lse = self._attend(lower, **self._logits, return_lse=True)
        total = torch.logaddexp(self._lse, more_lse)
        shares = [(lse - total).exp().nan_to_num(0)[..., None] for lse in (self._lse, more_lse)]
        out = shares[0] * self._out + shares[1] * more.to(total.dtype)
        self._clock.lap("attend")
        with torch.no_grad():
            group = out.shape[1] // lower.shape[1]
            added, read = ((part >= 0).sum(-1) for part in (lower, self.indices))
            unread = self._visible - read
            counts = unread.to(total.dtype).log() - added.to(total.dtype).log()
            edge = counts.repeat_interleave(group, dim=1) + more_lse - total
            change = ((out - self._out).norm(dim=-1) / out.norm(dim=-1)).log()
            self.statistics = torch.stack((edge, change), -1).clamp(-LOG_LIMIT, LOG_LIMIT)
        self._out, self._lse = out, total


def read_verified(reading: Reading, fallback: Fallback, layer: int, clock: Any = NO_CLOCK) -> None:
    """Double the lists of a reading until the fallback predicts no error above its tolerance."""
    while True:
        with torch.no_grad():
            more = fallback.exceeds(layer, reading.statistics, reading.levels)
            more &= reading.new & ~reading.dense
        ended = not more.any()
        clock.lap("verify")
        if ended:
            return
        reading.double(more)


def _added(now: Tensor, before: Tensor, n: int) -> Tensor:
    """The tokens of lists `now` that are not in `before`, both (batch, lists, q, m) int32,
    ascending, -1 padded, of n tokens; and so is the result."""
    slots = n + 1  # the last takes the padding
    known = torch.zeros((*now.shape[:-1], slots), dtype=torch.bool, device=now.device)
    known.scatter_(-1, before.long().remainder(slots), True)
    known[..., n] = True
    added = ~known.gather(-1, now.long().remainder(slots))
    width = int(added.sum(dim=-1).max()) if added.numel() else 0
    place = torch.where(added, added.cumsum(dim=-1) - 1, width)
    room = torch.full((*now.shape[:-1], width + 1), -1, dtype=now.dtype, device=now.device)
    return room.scatter_(-1, place, now)[..., :width].contiguous()


def _trimmed(indices: Tensor) -> Tensor:
    """Without columns that are padding in every row."""
    if not indices.numel():
        return indices
    width = int((indices >= 0).sum(dim=-1).max())
    return indices[..., :width].contiguous()

"""Reading that grows: the token lists of one call, doubled one by one.

Two statistics say how far a list's output may be from dense attention, and cost no further token.

Of a list that is ranked. The best h tokens contain the best h / 2, so a list that doubles reads
only those that it adds, and outputs over disjoint tokens are merged by their softmax sums. The
tokens added last are the lower half of a list by score:
edge: tokens not read x mean weight of the lower half / weight of all that was read, the weight that
is missed if the next tokens weigh what the last ones did;
change: |o - o'| / |o|, o' the output before the lower half was read.

Of a list of which a part is drawn. Inclusion probabilities, and with them the weights of what was
read, change as it grows, so it is read anew:
bar: the error that the sample itself estimates (hashattn.attention.error_bars) / |o|;
drawn: the part of the weight that drawn tokens have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashattn.attention.error_bars import sample_statistics
from hashattn.attention.observer import NO_CLOCK
from hashattn.kernels import LEAST_HEAVY, LOG_LIMIT, gather_tokens, mask_to_indices

if TYPE_CHECKING:
    from hashattn.attention.fallback import Fallback
    from hashattn.selectors.plan import SelectionPlan

Sample = Callable[["SelectionPlan"], tuple[Tensor, Tensor | None]]
Gather = Callable[[Tensor], tuple[Tensor, Tensor]]


class Reading(ABC):
    """The lists of one call of one layer; `reading_of` makes them.

    levels (batch, lists, q) int64: how far each list has come, `top` where it reads all that its
    row sees. indices (batch, lists, q, m): all that was read. log_weights, like indices: what is
    added to their logits, or None. out (batch, heads, q, Dv): the output. new (batch, lists, q):
    lists that the last read made longer. statistics (batch, heads, q, 2): logs, meaningful for
    lists that are new and not dense.
    """

    indices: Tensor
    log_weights: Tensor | None
    statistics: Tensor

    def __init__(
        self, sample: Sample, query: Tensor, plan: SelectionPlan, top: int, start: Tensor,
        clock: Any,
    ) -> None:  # fmt: skip
        self._sample, self._plan, self._top, self._clock = sample, plan, top, clock
        shape = query.shape[0], len(start), query.shape[2]
        candidates = (plan.visible - plan.sink - plan.local).clamp(min=0)
        self._candidates = candidates[:, None].expand(shape)
        self._visible = plan.visible[:, None].expand(shape)
        self._first = plan.heavy.clamp(min=LEAST_HEAVY).expand(shape)
        self._everything = None
        self.new = torch.ones(shape, dtype=torch.bool, device=query.device)
        self.levels = start[:, None].expand(shape)

    @property
    @abstractmethod
    def out(self) -> Tensor:
        """Attention over `indices`, in the query's dtype."""

    @property
    def dense(self) -> Tensor:
        """Lists that read all their rows see, bool (batch, lists, q)."""
        return self.levels == self._top

    def double(self, which: Tensor) -> None:
        """Double the heavy tokens of lists, bool (batch, lists, q); those that are dense stay."""
        self.new = which & ~self.dense
        self.levels = self.levels + self.new.long()
        self._list(self._heavy())
        self._clock.lap("select")
        self._read()

    @abstractmethod
    def _read(self) -> None:
        """Read what `indices` list, and find the statistics."""

    @torch.no_grad()
    def _heavy(self) -> Tensor:
        """Heavy tokens (batch, lists, q) of the lists at their levels; levels are `top` from where
        these are all tokens."""
        heavy = torch.minimum(self._first << self.levels, self._candidates)
        self.levels = self.levels.masked_fill(heavy >= self._candidates, self._top)
        return heavy

    @torch.no_grad()
    def _list(self, heavy: Tensor) -> None:
        """Set `indices` and `log_weights`: `heavy` tokens of each list, or everything."""
        dense = self.dense
        if not dense.any():
            self.indices, self.log_weights = self._chosen(heavy)
            return
        if self._everything is None:
            self._everything = mask_to_indices(self._plan.seen)
        width = self._everything.shape[-1]
        if dense.all():
            self.indices = self._everything.expand(*dense.shape, width).contiguous()
            if self._plan.draw is not None:
                self.log_weights = torch.zeros(self.indices.shape, device=dense.device)
            return
        indices, log_weights = self._chosen(heavy.masked_fill(dense, 0))
        room = 0, width - indices.shape[-1]
        whole = dense[..., None]
        self.indices = torch.where(whole, self._everything, pad(indices, room, value=-1))
        if log_weights is not None:
            log_weights = pad(log_weights, room).masked_fill(whole, 0)
        self.log_weights = log_weights

    @torch.no_grad()
    def _chosen(self, heavy: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a plan of so many heavy tokens reads, without columns that are all padding."""
        indices, log_weights = self._sample(self._plan.with_heavy(heavy))
        indices = _trimmed(indices)
        if log_weights is not None:
            log_weights = log_weights[..., : indices.shape[-1]].contiguous()
        return indices, log_weights


class RankedReading(Reading):
    """Lists of the best tokens; each token is read once."""

    def __init__(
        self, sample: Sample, attend: Callable[..., Any], query: Tensor, plan: SelectionPlan,
        logits: dict[str, Any], top: int, start: Tensor, clock: Any = NO_CLOCK,
    ) -> None:  # fmt: skip
        super().__init__(sample, query, plan, top, start, clock)
        self.log_weights = None
        self._attend, self._dtype, self._logits = attend, query.dtype, logits
        heavy = self._heavy()
        upper, _ = self._chosen(heavy // 2)
        self._list(heavy)
        self._clock.lap("select")
        out, self._lse = attend(upper, **logits, return_lse=True)
        self._out, self._known = out.to(self._lse.dtype), upper
        self._logits = logits | {"sinks": None}  # they are in the first sum, and count once
        self._read()

    @property
    def out(self) -> Tensor:
        return self._out.to(self._dtype)

    def _read(self) -> None:
        lower = _added(self.indices, self._known, self._plan.n)
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
        self._out, self._lse, self._known = out, total, self.indices


class DrawnReading(Reading):
    """Lists of which a part is drawn."""

    def __init__(
        self, sample: Sample, attend: Callable[..., Any], query: Tensor, gather: Gather,
        plan: SelectionPlan, logits: dict[str, Any], top: int, start: Tensor,
        clock: Any = NO_CLOCK,
    ) -> None:  # fmt: skip
        super().__init__(sample, query, plan, top, start, clock)
        self._attend, self._query, self._gather, self._logits = attend, query, gather, logits
        self._out = query.new_zeros(())
        self._list(self._heavy())
        self._clock.lap("select")
        self._read()

    @property
    def out(self) -> Tensor:
        return self._out

    def _read(self) -> None:
        new = self.indices.masked_fill(~self.new[..., None], -1)  # the others' outputs stand
        out = self._attend(new, log_weights=self.log_weights, **self._logits)
        group = out.shape[1] // new.shape[1]
        self._out = torch.where(self.new.repeat_interleave(group, dim=1)[..., None], out, self._out)
        self._clock.lap("attend")
        with torch.no_grad():
            looked_at = _trimmed(new.masked_fill(self.dense[..., None], -1))
            log_weights = self.log_weights[..., : looked_at.shape[-1]]
            rows = self._gather(looked_at)
            found = sample_statistics(self._query, *rows, looked_at, log_weights, **self._logits)
            bar = found[0] / self._out.float().norm(dim=-1)
            self.statistics = torch.stack((bar, found[1]), -1).log().clamp(-LOG_LIMIT, LOG_LIMIT)


def reading_of(
    sample: Sample, attend: Callable[..., Any], query: Tensor, gather: Gather,
    plan: SelectionPlan, logits: dict[str, Any], top: int, start: Tensor, clock: Any = NO_CLOCK,
) -> Reading:  # fmt: skip
    """The lists of one call, at the levels that they begin with.

    sample: plan -> indices (batch, lists, q, m) int32 and log weights like them, or None, of what
    is read (`Selector.sample`). attend: `kernels.attend` but for the query, keys and values. query
    (batch, heads, q, D); gather: tokens (batch, lists, q, m) -> their keys and values, an axis more
    each; logits: keywords of `attend`. top: the level that is dense. start (lists,) int64: levels
    to begin with.
    """
    if plan.draw is None:
        return RankedReading(sample, attend, query, plan, logits, top, start, clock)
    return DrawnReading(sample, attend, query, gather, plan, logits, top, start, clock)


def gather_rows(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, lists, q, m, dim) of tokens (batch, lists, q, m), from those of all
    tokens (batch, kv_heads, n, dim)."""
    return gather_tokens(keys, indices), gather_tokens(values, indices)


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

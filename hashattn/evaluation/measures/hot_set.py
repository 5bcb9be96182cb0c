"""How much of what sparse attention reads was read shortly before: hits of a hot set.

Codes stay in fast memory; of keys and values a hot set may, the rows of the tokens that a KV head
used last. Rows are used when they are written and whenever a query head of the group reads them.
One stack for each KV head, most recent first, gives the hits of hot sets of every size at once,
since a set of C rows holds the first C of the stack (Mattson, Gecsei, Slutz, Traiger 1970).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashattn.attention.observer import LayerStep
from hashattn.base.checks import is_count, is_number, require
from hashattn.kernels import indices_to_mask

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
_STEP = 1 << 32  # a stamp is the tokens cached at a use times this, plus the token


class HotSet:
    """An observer of one sequence that decodes: see `rows`.

    warm: the first steps of each layer order the stacks and are not counted. A call that does not
    follow the layer's last one begins the stacks anew; what was counted stays. Memory is bounded by
    the tokens cached: a stamp, a count, and the lists of the last call. ValueError for a batch.
    """

    timed = False

    def __init__(self, warm: int = 1) -> None:
        require(is_count(warm, 1), "warm", warm, "at least 1 step, for one to be before the next")
        self._warm = warm
        self._layers: dict[int, _Layer] = {}

    def saw(self, step: LayerStep) -> None:
        """Count what the rows of a sparse call read, one step after the other."""
        if step.indices is None:
            return
        batch, _, rows, _ = step.indices.shape
        require(batch == 1, "batch", batch, "1: a hot set is measured over one sequence")
        layer = self._layers.setdefault(step.layer, _Layer(self._warm))
        layer.follow(step.n - rows)
        read = indices_to_mask(step.indices, step.n)[0].cpu()
        lists = read.unflatten(0, (step.values.shape[1], -1))
        for row, candidates in enumerate(step.plan.candidates[0, 0].cpu()):
            n = step.n - rows + row + 1
            layer.add(lists[:, :, row, :n], candidates[:n])

    def rows(self, shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
        """A row for each layer and share of the cached tokens in the hot set, sinks and local
        tokens counted in; ValueError before a step was counted, or for shares outside (0, 1].

        Columns: layer, share, and over the tokens read beside sink and local ones: hits (share of
        a KV head's rows that the hot set holds when the step begins), again (share of a list's
        tokens that it read the step before), union (rows of a KV head / rows of one of its lists),
        steps (those counted).
        """
        for share in shares:
            require(is_number(share) and 0 < share <= 1, "share", share, "a number in (0, 1]")
        require(any(layer.steps for layer in self._layers.values()), "steps", 0,
                f"more than the {self._warm} that warm up, of sparse attention")  # fmt: skip
        return [
            {"layer": number, "share": share, "hits": layer.hits(share)} | layer.means()
            for number, layer in sorted(self._layers.items())
            for share in shares
        ]


class _Layer:
    """The stacks of one layer's KV heads and what was counted of them."""

    def __init__(self, warm: int) -> None:
        self._warm = self._left = warm
        self._stamps = torch.zeros(1, 0, dtype=torch.int64)  # (KV heads, n): when last used
        self._before = torch.zeros(0)  # what the lists of the last step chose
        self._found = torch.zeros(0, dtype=torch.int64)  # rows read, by place in the stack
        self._sums: Counter[str] = Counter()
        self.steps = 0

    def follow(self, cached: int) -> None:
        """Begin anew unless `cached` tokens were there after the last step."""
        if cached != self._stamps.shape[1]:
            self._left, self._stamps = self._warm, self._stamps[:1, :0]

    def add(self, lists: Tensor, candidates: Tensor) -> None:
        """One step: the tokens read, (KV heads, lists of each, n) bool, and those that are neither
        sink nor local, (n,) bool."""
        tokens = torch.arange(lists.shape[-1])
        written = tokens[self._stamps.shape[1] :]
        stamps = torch.cat([self._stamps, _stamp(written).expand(len(self._stamps), -1)], dim=-1)
        stamps = stamps.expand(len(lists), -1)
        chosen = lists & candidates
        if self._left:
            self._left -= 1
        else:
            self._count(chosen, stamps.argsort(dim=-1, descending=True))
        self._stamps = torch.where(lists.any(1), _stamp(tokens, len(tokens)), stamps)
        self._before = chosen

    def _count(self, chosen: Tensor, stacks: Tensor) -> None:
        group = chosen.shape[1]
        rows = chosen.any(1)
        found = rows.gather(-1, stacks).sum(0)
        room = max(len(found), len(self._found))
        self._found = pad(self._found, (0, room - len(self._found))) + pad(
            found, (0, room - len(found))
        )
        again = chosen[..., : self._before.shape[-1]] & self._before
        self.steps += 1
        self._sums.update(rows=int(rows.sum()), chosen=int(chosen.sum()) / group,
                          again=int(again.sum()) / group)  # fmt: skip

    def hits(self, share: float) -> float:
        """Share of the rows that a hot set of this part of the tokens held."""
        return self._share(int(self._found[: int(share * len(self._found))].sum()), "rows")

    def means(self) -> dict[str, float]:
        """The columns of `HotSet.rows` that the hot set's size does not change."""
        again, union = (self._share(self._sums[of], "chosen") for of in ("again", "rows"))
        return {"again": again, "union": union, "steps": self.steps}

    def _share(self, part: float, whole: str) -> float:
        return part / self._sums[whole] if self._sums[whole] else float("nan")


def _stamp(tokens: Tensor, cached: int | None = None) -> Tensor:
    """When tokens are used: with `cached` ones there, or when each is written itself."""
    return (tokens + 1 if cached is None else cached) * _STEP + tokens

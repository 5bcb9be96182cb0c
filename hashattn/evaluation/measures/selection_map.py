"""What a selector reads of a captured layer, token by token: what a picture of it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.evaluation.measures.selection import selected_rows
from hashattn.kernels import indices_to_mask

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer
    from hashattn.selectors.base import Selector

KINDS = (
    "later than the query",
    "not read",
    "sink and recent",
    "read, and one of the best k",
    "read, and none of them",
    "one of the best k, missed",
)
LATER, UNREAD, MANDATORY, HIT, OTHER, MISSED = range(len(KINDS))


@dataclass(frozen=True)
class SelectionMap:
    """kinds (rows, n) int8: for each query row of one query head, each token's index in KINDS.

    positions (rows,) int64: the token index of each query.
    """

    method: str
    layer: int
    head: int
    positions: Tensor
    kinds: Tensor

    @property
    def hits(self) -> float:
        """Share of the best k tokens that were read, over all rows."""
        best = (self.kinds == HIT).sum() + (self.kinds == MISSED).sum()
        return float((self.kinds == HIT).sum() / best)


def selection_map(
    layer: CapturedLayer,
    selector: Selector,
    heavy: int,
    sink: int = 4,
    local: int = 28,
    *,
    head: int = 0,
    prompt: int = 0,
    name: str | None = None,
) -> SelectionMap:
    """Which tokens the selector reads for each captured query of a query head, and which of the
    `heavy` best by q.k outside sink and recent tokens it misses.

    Arguments as of selection_metrics, whose one selection this shows. ValueError for a head that
    the layer does not have.
    """
    require(0 <= head < len(layer.queries), "head", head, f"0 to {len(layer.queries) - 1}")
    truth, (indices, _) = selected_rows(layer, selector, heavy, sink, local, prompt)
    n, lists = layer.keys.shape[1], indices.shape[1]
    read = indices_to_mask(indices, n)[0, head * lists // len(layer.queries)]
    best = torch.zeros_like(read).scatter_(-1, truth.best[head], True) & truth.candidates
    kinds = torch.full(read.shape, UNREAD, dtype=torch.int8)
    for kind, mask in (
        (OTHER, read),
        (MISSED, best),
        (HIT, read & best),
        (MANDATORY, truth.visible & ~truth.candidates),
        (LATER, ~truth.visible),
    ):
        kinds[mask] = kind
    return SelectionMap(name or selector.name, layer.layer, head, truth.positions, kinds)

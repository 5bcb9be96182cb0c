"""From scores to attention logits: one slope for each list of tokens, by which they are drawn.

Ranking needs no scale; drawing tokens with probabilities in proportion to w = exp(slope * score)
does. The variance of a sum of attention weights a that is estimated so grows with the chi-square
divergence, sum(a^2 / w) sum(w) (hashattn.kernels.sample): the slope is the one that makes it least.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.hashing.labels import attention_logits, candidate_mask
from hashattn.kernels import encode, hamming_scores, unpack_bits

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer
    from hashattn.hashing.maps import LayerMaps

FLOOR = 0.1  # of the mean weight, below which no token's is taken to be
_FACTORS = torch.logspace(-1, 0.5, 25)  # of the least-squares slope, among which the best is sought
ROWS = 32  # of a captured layer that are looked at
LEAST = 4  # candidates that a row must see for each token of sink and local
_UPPER = 5  # of the candidates, the part with the highest logits: a fifth


def telling_rows(positions: Tensor, sink: int, local: int) -> Tensor:
    """Up to ROWS of captured rows at positions (r,) that see enough candidates: indices, int64."""
    rows = (positions >= LEAST * (sink + local)).nonzero()[:, 0]
    return rows[:: max(1, -(-len(rows) // ROWS))]


class Slope:
    """Finds a layer's slopes, of any number of sequences."""

    def __init__(self, sink: int, local: int) -> None:
        self.sink, self.local = sink, local
        self._first: Tensor | None = None
        self._spread = torch.zeros(0)

    def add(self, layer: CapturedLayer, rows: Tensor, scores: Tensor) -> None:
        """scores (lists, r, n) of some rows (r,) of a captured layer, `telling_rows`: each list has
        as many query heads."""
        allowed = candidate_mask(layer.positions[rows], scores.shape[-1], self.sink, self.local)
        logits = attention_logits(layer.queries[:, rows], layer.keys, layer.scaling, layer.softcap)
        true = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        true = true.unflatten(0, (len(scores), -1)).logsumexp(1)
        if self._first is None:
            self._first = _least_squares(scores.float(), true, allowed)
            self._spread = torch.zeros(len(_FACTORS), len(scores))
        self._spread += divergence(scores.float(), self._first, true, allowed)

    def best(self) -> Tensor:
        """(lists,) float32, above 0. ValueError if nothing was added."""
        if self._first is None:
            tokens = LEAST * (self.sink + self.local)
            raise ValueError(
                f"no captured row sees {tokens} tokens, {LEAST} for each of sink and local: "
                "capture longer sequences, or later rows"
            )
        return self._first * _FACTORS[self._spread.argmin(0)]


def map_slopes(
    maps: LayerMaps, captures: Iterable[CapturedLayer], group: str, sink: int, local: int
) -> Tensor | None:
    """Slopes (lists,) of hash maps in the form that they were trained for (TrainRecipe.group).

    "each": nats for a unit of the query's pre-activation, a list per query head; "sum": nats for a
    matching bit, a list per key map. None where no captured row sees enough tokens.
    """
    slope, some = Slope(sink, local), False
    for layer in captures:
        rows = telling_rows(layer.positions, sink, local)
        if len(rows):
            slope.add(layer, rows, _scores(maps, layer, rows, group))
            some = True
    return slope.best() if some else None


def _scores(maps: LayerMaps, layer: CapturedLayer, rows: Tensor, group: str) -> Tensor:
    queries, codes = layer.queries[None, :, rows], encode(layer.keys[None], maps.key)
    if group == "sum":
        return hamming_scores(encode(queries, maps.query), codes)[0]
    pre = maps.query(queries)[0]
    signs = unpack_bits(codes[0], pre.shape[-1]).float() * 2 - 1
    return pre @ signs.repeat_interleave(len(pre) // len(signs), 0).mT


def _least_squares(scores: Tensor, true: Tensor, allowed: Tensor) -> Tensor:
    """Slopes (lists,) of true logits on scores, over the candidates with the highest logits."""
    count = (allowed.sum(-1) // _UPPER).clamp(min=2)
    order = true.sort(-1, descending=True).values
    least = order.gather(-1, (count - 1).expand(len(true), -1)[..., None])
    top = (true >= least) & allowed & scores.isfinite()
    number = top.sum(-1, keepdim=True).clamp(min=1)
    x, y = (part.masked_fill(~top, 0) for part in (scores, true))
    x, y = (part - part.sum(-1, keepdim=True) / number * top for part in (x, y))
    return ((x * y).sum((1, 2)) / (x * x).sum((1, 2)).clamp(min=1e-12)).clamp(min=1e-6)


def divergence(scores: Tensor, slopes: Tensor, true: Tensor, allowed: Tensor) -> Tensor:
    """log sum(a^2 / w) sum(w) for each of _FACTORS times the slopes, summed over rows: (factors,
    lists) of scores and log a, true, (lists, r, n)."""
    least = (FLOOR / allowed.sum(-1, keepdim=True)).log()
    sums = []
    for factor in _FACTORS:
        logits = scores * (factor * slopes)[:, None, None]
        logits = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        logits = torch.logaddexp(logits, least)  # where nothing is allowed, a is 0
        total = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1)
        sums.append(((2 * true - logits).logsumexp(-1) + total).sum(-1))
    return torch.stack(sums)

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
_STEP, _STEPS = 0.1, 25  # of the least-squares slope: multiples among which the best is sought
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
        true, allowed = _true(layer, rows, len(scores), self.sink, self.local)
        if self._first is None:
            self._first = _least_squares(scores.float(), true, allowed)
            self._spread = torch.zeros(_STEPS, len(scores))
        self._spread += divergence(scores.float(), _STEP * self._first, true, allowed, _STEPS)

    def best(self) -> Tensor:
        """(lists,) float32, above 0. ValueError if nothing was added."""
        if self._first is None:
            tokens = LEAST * (self.sink + self.local)
            raise ValueError(
                f"no captured row sees {tokens} tokens, {LEAST} for each of sink and local: "
                "capture longer sequences, or later rows"
            )
        least = self._spread.argmin(0, keepdim=True).clamp(1, _STEPS - 2)
        below, here, above = (self._spread.gather(0, least + i)[0] for i in (-1, 0, 1))
        # where a parabola through the three has its least value
        shift = (below - above) / (2 * (below - 2 * here + above)).clamp(min=1e-12)
        return self._first * _STEP * (1 + least[0] + shift.clamp(-1, 1))


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
            slope.add(layer, rows, map_scores(maps, layer, rows, group))
            some = True
    return slope.best() if some else None


def mean_divergence(
    maps: LayerMaps, slopes: Tensor, captures: Iterable[CapturedLayer], group: str, sink: int,
    local: int,
) -> float | None:  # fmt: skip
    """log sum(a^2 / w) sum(w) in nats, the mean over rows and lists, of maps and slopes as of
    `map_slopes`. None where no captured row sees enough tokens."""
    total, count = 0.0, 0
    for layer in captures:
        rows = telling_rows(layer.positions, sink, local)
        if len(rows):
            scores = map_scores(maps, layer, rows, group).float()
            true, allowed = _true(layer, rows, len(scores), sink, local)
            total += float(divergence(scores, slopes, true, allowed).sum())
            count += scores.shape[0] * scores.shape[1]
    return total / count if count else None


def _true(
    layer: CapturedLayer, rows: Tensor, lists: int, sink: int, local: int
) -> tuple[Tensor, Tensor]:
    """Logarithms of attention weights among the candidates of some rows, summed over the heads of
    each list, (lists, r, n), and which tokens those are, bool (r, n)."""
    allowed = candidate_mask(layer.positions[rows], layer.keys.shape[1], sink, local)
    logits = attention_logits(layer.queries[:, rows], layer.keys, layer.scaling, layer.softcap)
    true = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    return true.unflatten(0, (lists, -1)).logsumexp(1), allowed


def map_scores(maps: LayerMaps, layer: CapturedLayer, rows: Tensor, group: str) -> Tensor:
    """Scores (lists, r, n) of some rows of a captured layer, in the form that `map_slopes` says."""
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


def divergence(
    scores: Tensor, slopes: Tensor, true: Tensor, allowed: Tensor, multiples: int = 1
) -> Tensor:
    """log sum(a^2 / w) sum(w) for 1, 2, ... `multiples` times the slopes, summed over rows:
    (multiples, lists) of scores and log a, true, (lists, r, n)."""
    logits = (scores * slopes[:, None, None]).masked_fill(~allowed, -torch.inf)
    once = (logits - logits.amax(-1, keepdim=True)).exp()
    least, squares = FLOOR / allowed.sum(-1, keepdim=True), (2 * true).exp()
    sums, powers = [], allowed.to(once.dtype)
    for _ in range(multiples):  # powers instead of exponentials, which would take five times longer
        powers = powers * once
        weights = powers / powers.sum(-1, keepdim=True) + least
        sums.append(((squares / weights).sum(-1) * (1 + FLOOR)).log().sum(-1))
    return torch.stack(sums)

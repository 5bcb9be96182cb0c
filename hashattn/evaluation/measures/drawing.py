"""Ranked beside drawn: the error of the attention output, its bias and its variance apart.

What is read by rank errs the same way every time; what is drawn errs around its expectation. With o
the output of a draw and d that of dense attention, E|o - d|^2 = |E o - d|^2 + E|o - E o|^2: the
squared bias, of which a ratio of unbiased sums has little, and the variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.evaluation.measures.selection import (
    ROWS_AT_ONCE,
    Truth,
    rows_with_candidates,
    stored_keys,
)

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer
    from hashattn.selectors.base import Selector


def drawing_errors(
    captured: Iterable[CapturedLayer],
    selectors: Mapping[str, Selector],
    heavy: Sequence[int],
    sampled: Sequence[float] = (0.0, 0.5),
    draws: int = 8,
    sink: int = 4,
    local: int = 28,
    by_head: bool = False,
    last: int | None = None,
) -> list[dict[str, Any]]:
    """One row for each captured layer, selector, heavy budget and part of it that is drawn
    (Budget.sampled). A selector that only ranks has a row for 0 alone, and one that samples by
    itself a row with sampled NaN. by_head: a row for each KV head instead, column head. last: look
    at the last so many captured queries alone, those that see the most tokens.

    Columns: method, layer, heavy, sampled, and three means of squares over query heads and rows,
    relative to the dense output: squared_error, squared_bias and variance, of which the first is
    the sum of the others. Both are unbiased estimates from `draws` seeds (2 at least), so that the
    squared bias may fall below 0. ValueError for other draws, or layers without values.
    """
    require(is_count(draws, 2), "draws", draws, "an integer of at least 2")
    table = []
    for layer in captured:
        require(layer.values is not None, "captured", f"layer {layer.layer} without values",
                "layers captured with values=True")  # fmt: skip
        kept = rows_with_candidates(layer, sink, local)
        kept = kept if last is None else kept[-last:]
        index = {name: stored_keys(selector, layer, 0) for name, selector in selectors.items()}
        parts: dict[tuple[str, int, float | None], list[Tensor]] = {}
        for rows in kept.split(ROWS_AT_ONCE):
            truth = Truth(layer, rows, (sink, local), (1,), None)
            for name, selector in selectors.items():
                scores = truth.scores(selector, index[name]) if selector.ranks else None
                for tokens, share in product(heavy, _shares(selector, layer.layer, sampled)):
                    outputs = _outputs(truth, selector, index[name], scores, tokens, share, draws)
                    squares = _squares(truth, outputs)
                    parts.setdefault((name, tokens, share), []).append(squares)
        for (name, tokens, share), squares in parts.items():
            labels = {
                "method": name, "layer": layer.layer, "heavy": tokens,
                "sampled": float("nan") if share is None else share,
            }  # fmt: skip
            means = torch.cat(squares, dim=-1).mean(dim=-1)
            for head, own in enumerate(means.chunk(len(layer.keys) if by_head else 1, dim=1)):
                error, variance = own.mean(dim=1).tolist()
                table.append(labels | ({"head": head} if by_head else {}) | {
                    "squared_error": error, "squared_bias": error - variance, "variance": variance,
                })  # fmt: skip
    return table


def _shares(selector: Selector, layer: int, sampled: Sequence[float]) -> list[float | None]:
    """The parts that are drawn; None: as the method itself has it."""
    if not selector.ranks:
        return [None]
    return list(sampled) if selector.estimates_logits(layer) else [0.0]


def _outputs(
    truth: Truth, selector: Selector, index: dict, scores: Tensor | None, heavy: int,
    share: float | None, draws: int,
) -> Tensor:  # fmt: skip
    """Attention outputs (draws, query heads, rows, D); one where all tokens are ranked."""
    outputs = []
    for seed in range(1 if share == 0 else draws):
        if share is None:  # what it stores may depend on its seed, as hyperplanes do
            selector = replace(selector, seed=seed)
            index = stored_keys(selector, truth.layer, 0)
        outputs.append(
            truth.output(*truth.read(selector, index, scores, heavy, share or 0.0, seed))
        )
    return torch.stack(outputs)


def _squares(truth: Truth, outputs: Tensor) -> Tensor:
    """Squared error and variance of outputs, relative to dense, (2, query heads, rows)."""
    made, size = outputs.double(), truth.dense.double().square().sum(-1)
    error = (made - truth.dense).square().sum(-1).mean(0) / size
    variance = made.var(0).sum(-1) / size if len(made) > 1 else torch.zeros_like(error)
    return torch.stack([error, variance])

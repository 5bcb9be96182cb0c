"""Budgets that differ by layer and head: a token goes where it saves the most output error, and is
drawn where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from hashattn.base.checks import require
from hashattn.evaluation.measures.drawing import drawing_errors
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.selectors.base import Selector

_PARTS, _DRAWS = (0.0, 0.25, 0.5, 0.75), 4
_ROWS = 32  # of each captured layer, the last
_SPREAD = 1 / 16
_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def allocate(
    captured: Sequence[CapturedLayer],
    selector: Selector,
    heavy: int,
    sink: int = 4,
    local: int = 28,
) -> tuple[tuple[float, ...], ...]:
    """Budget.shares (for each layer, one factor a KV head) by which `selector`, at `heavy` tokens
    on average, errs least.

    captured: every layer of the calibration sequences, with values. The mean output error of each
    layer and KV head is measured at _FACTORS times `heavy`; tokens then go where they save the
    most, along the convex hulls of these curves, which is optimal for their sum (Everett 1963, with
    the last step divided). Every head counts the same. ValueError without values or for heavy < 1.
    """
    _check(captured, heavy)
    tokens = sorted({round(factor * heavy) for factor in _FACTORS})
    rows = selection_metrics(captured, {"selector": selector}, tokens, sink, local, by_head=True)
    curves: dict[tuple[int, int], dict[int, list[float]]] = {}
    for row in rows:
        curve = curves.setdefault((row["layer"], row["head"]), {})
        curve.setdefault(row["heavy"], []).append(row["output_error"])
    means = {
        head: [(count / heavy, fmean(errors)) for count, errors in sorted(curve.items())]
        for head, curve in curves.items()
    }
    return _by_layer(divide(means), 1.0)


def split(
    captured: Sequence[CapturedLayer],
    selector: Selector,
    heavy: int,
    sink: int = 4,
    local: int = 28,
    spread: float = _SPREAD,
) -> tuple[tuple[float, ...], ...]:
    """Budget.sampled by layer and KV head: which of _PARTS of `heavy` tokens is best drawn by
    `selector`'s estimates, 0 where ranking alone is.

    captured: as of `allocate`. Least is squared bias + spread * variance of the attention output,
    relative to dense. spread: what an error that is new in every head, layer and step counts beside
    one that always leans the same way; of 1/4, 1/16 and 1/64 the default had SmolLM2's least KL
    divergence at 1/16. Calibrate on the kinds of text that will be read: what pays on one may lose
    on another. ValueError as of `allocate`, or for a selector whose scores estimate no
    logits.
    """
    _check(captured, heavy)
    for layer in captured:
        selector.require_estimates(layer.layer)
    rows = drawing_errors(
        captured, {"selector": selector}, [heavy], _PARTS, _DRAWS, sink, local, by_head=True,
        last=_ROWS,  # they see nearly as many tokens as a budget of `heavy` is meant for
    )  # fmt: skip
    costs: dict[tuple[int, int], dict[float, float]] = {}
    for row in rows:
        cost = costs.setdefault((row["layer"], row["head"]), dict.fromkeys(_PARTS, 0.0))
        cost[row["sampled"]] += row["squared_bias"] + spread * row["variance"]
    return _by_layer({head: min(cost, key=cost.__getitem__) for head, cost in costs.items()}, 0.0)


def _check(captured: Sequence[CapturedLayer], heavy: int) -> None:
    require(heavy >= 1, "heavy", heavy, "at least 1 token, or there is nothing to divide")
    missing = sorted({layer.layer for layer in captured if layer.values is None})
    if missing or not captured:
        raise ValueError(f"layers {missing} were captured without values: capture(values=True)")


def _by_layer(values: dict[tuple[int, int], float], other: float) -> tuple[tuple[float, ...], ...]:
    """Numbers by layer and head in a tuple for each layer; `other` for what was not captured."""
    layers = range(max(layer for layer, _ in values) + 1)
    heads = range(max(head for _, head in values) + 1)
    return tuple(tuple(values.get((layer, head), other) for head in heads) for layer in layers)


def divide(
    curves: dict[tuple[int, int], list[tuple[float, float]]],
) -> dict[tuple[int, int], float]:
    """Factors, 1 on average, that minimise the sum of the curves' lower convex hulls.

    curves: points (factor, error) of each head, by ascending factor, the first at 0.
    """
    segments = [
        ((low[1] - high[1]) / (high[0] - low[0]), high[0] - low[0], head)
        for head, curve in curves.items()
        for low, high in pairwise(_hull(curve))
    ]
    factors, left = dict.fromkeys(curves, 0.0), float(len(curves))
    for _, length, head in sorted(segments, key=lambda segment: -segment[0]):
        part = min(length, left)
        factors[head] += part
        left -= part
    return factors


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of points by ascending first coordinate."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(
    first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]
) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    slope = (last[1] - first[1]) / (last[0] - first[0])
    return middle[1] >= first[1] + slope * (middle[0] - first[0])

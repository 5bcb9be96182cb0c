"""A method whose scores are read as attention logits, so that tokens can be drawn by them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from hashattn.hashing.slopes import Slope, telling_rows
from hashattn.selectors.base import KeyView, Selector

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer

Method = TypeVar("Method", bound=Selector)


def fit_slopes(
    selector: Method, captured: Iterable[CapturedLayer], sink: int = 4, local: int = 28
) -> Method:
    """The same method with `slopes`, fitted to captured layers of some sequences (hashing.slopes).

    A list that serves several query heads estimates the sum of their weights. Methods that observe
    a prompt have no scores of single rows and cannot be fitted: ValueError, as where no row sees
    enough tokens.
    """
    if selector.observes or not selector.sparse:
        raise ValueError(f"selector {selector.name!r} has no scores to fit slopes to")
    found: dict[int, Slope] = {}
    for layer in captured:
        slope = found.setdefault(layer.layer, Slope(sink, local))
        rows = telling_rows(layer.positions, sink, local)
        if len(rows):
            index = selector.index_of(layer.layer, layer.keys, layer.values)
            view = KeyView(layer.keys[None], index, positions=layer.positions[rows])
            queries = layer.queries[None, :, rows]
            scores = selector.even_scores(layer.layer, queries, view, layer.scaling)
            slope.add(layer, rows, scores[0])
    if not found:
        raise ValueError("calibration got no captured layers; capture at least one sequence")
    return selector._with(slopes={layer: slope.best() for layer, slope in found.items()})

"""What a selection is still worth one step or one layer later: whether selecting may be skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hashattn.evaluation.measures.selection import selected_rows
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.labels import candidate_mask
from hashattn.kernels import indices_to_mask, mask_to_indices
from hashattn.selectors.base import Selector


def reuse(
    layers: Sequence[CapturedLayer],
    selector: Selector,
    heavy: int,
    sink: int = 4,
    local: int = 28,
    every: Sequence[int] = (1, 2, 4, 8),
) -> list[dict[str, Any]]:
    """A row for each layer, kind of reuse and number in `every`, of one sequence's captured layers,
    whose queries are at successive positions, with values.

    kind "steps": a head reads what it selected at the last step whose number `every` divides, and
    the sink and local tokens of its own step. "layers": it reads what the head of its number
    selected in the last layer whose number, among those captured, `every` divides. 1 is a selection
    of its own. heavy: tokens of a selection beside sink and local.
    Columns: kind, every, layer, heavy, overlap (share of the candidates it would select itself that
    it reads), density (tokens read / visible) and output_error, means over rows and query heads.
    ValueError for queries that are not successive, or layers captured without values.
    """
    truths, own = [], []
    for layer in layers:
        _check(layer)
        truth, (indices, _) = selected_rows(layer, selector, heavy, sink, local)
        truths.append(truth)
        own.append(indices_to_mask(indices, layer.keys.shape[1])[0])
    rows = []
    for number, (layer, truth) in enumerate(zip(layers, truths, strict=True)):
        candidates = candidate_mask(truth.positions, layer.keys.shape[1], sink, local)
        mandatory = truth.visible & ~candidates
        steps = torch.arange(len(truth.positions))
        for step in every:
            taken = {
                "steps": own[number][:, steps // step * step],
                "layers": own[number // step * step],
            }
            for kind, mask in taken.items():
                read = (mask & truth.visible) | mandatory
                measured = truth.measure(mask_to_indices(read[None]), None)
                rows.append({
                    "kind": kind, "every": step, "layer": layer.layer, "heavy": heavy,
                    "overlap": _share(own[number] & candidates, read),
                    "density": float(measured["density"].mean()),
                    "output_error": float(measured["output_error"].mean()),
                })  # fmt: skip
    return rows


def _share(selected: Tensor, read: Tensor) -> float:
    """Mean share of `selected` (lists, rows, n) that is in `read`."""
    hits, size = (selected & read).sum(-1), selected.sum(-1)
    return float((hits / size.clamp_min(1))[size > 0].mean())


def _check(layer: CapturedLayer) -> None:
    if layer.values is None:
        raise ValueError(f"layer {layer.layer} was captured without values: capture(values=True)")
    if not torch.equal(layer.positions.diff(), torch.ones(len(layer.positions) - 1).long()):
        raise ValueError(
            f"layer {layer.layer}: reuse is measured over successive positions; capture rows one "
            "after the other"
        )

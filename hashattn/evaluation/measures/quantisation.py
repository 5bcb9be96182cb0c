"""What keys and values of fewer bits cost: error of the attention output against bytes a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require
from hashattn.evaluation.measures.selection import Truth, selected_rows
from hashattn.hashing.capture import CapturedLayer
from hashattn.kernels import RowFormat, attend, attend_rows, merge, quantise
from hashattn.selectors.base import Selector

BITS = (16, 8, 4)
Attend = Callable[..., tuple[Tensor, Tensor]]


def quantisation_errors(
    captured: Iterable[CapturedLayer],
    selector: Selector,
    heavy: Sequence[int],
    bits: Sequence[int] = BITS,
    exact: Sequence[int] = (0,),
    sink: int = 4,
    local: int = 28,
) -> list[dict[str, Any]]:
    """A row for each captured layer, heavy budget, bits of a stored number and number in `exact`:
    how many of the most recent tokens, and if any the sink too, are read as they were.

    Tokens are selected by the unquantised keys. Columns: layer, heavy, bits, exact, bytes (of K and
    V of a token in this layer, where it is not exact), output_error (relative L2 error of the
    attention output against dense, unquantised attention) and added_error (the same against the
    unquantised output over the same selection), means over rows and query heads. bits: 8 and 4 are
    those of `quantise`, 16 is bfloat16. ValueError for other bits, or layers without values.
    """
    for number in bits:
        require(number in BITS, "bits", number, "16, 8 or 4")
    for number in exact:
        require(is_count(number, 0), "exact", number, "an integer of at least 0")
    table = []
    for layer in captured:
        require(layer.values is not None, "captured", f"layer {layer.layer} without values",
                "layers captured with values=True")  # fmt: skip
        stored = {number: _stored(layer, number) for number in bits}
        for tokens in heavy:
            truth, read = selected_rows(layer, selector, tokens, sink, local)
            whole = truth.output(*read)
            for number in bits:
                for recent in exact:
                    made = _output(truth, read, stored[number], recent, sink if recent else 0)
                    table.append({
                        "layer": layer.layer, "heavy": tokens, "bits": number, "exact": recent,
                        "bytes": len(layer.keys) * _row_bytes(layer, number),
                        "output_error": _error(made, truth.dense),
                        "added_error": _error(made, whole),
                    })  # fmt: skip
    return table


def _row_bytes(layer: CapturedLayer, bits: int) -> int:
    dims = layer.keys.shape[-1], layer.values.shape[-1]
    return 2 * sum(dims) if bits == 16 else RowFormat(bits, *dims).width


def _error(made: Tensor, expected: Tensor) -> float:
    return float(((made - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def _output(
    truth: Truth, read: tuple[Tensor, Tensor | None], stored: Attend, recent: int, sink: int
) -> Tensor:
    """Attention (query heads, rows, Dv) over lists, of which what is not exact is stored: two
    parts, merged by the logs of their softmax sums."""
    layer, (indices, log_weights) = truth.layer, read
    newest = truth.positions.to(indices.device)[:, None]
    kept = (indices > newest - recent) | (indices < sink)
    queries, keys, values = (x[None].float() for x in (truth.queries, layer.keys, layer.values))
    exact = partial(attend, k=keys, v=values)
    parts = []
    for attended, own in ((exact, kept & (indices >= 0)), (stored, ~kept & (indices >= 0))):
        order = own.int().argsort(dim=-1, descending=True, stable=True)  # padding lies at the end
        parts.append(attended(
            queries, indices=indices.where(own, -1).gather(-1, order), scaling=layer.scaling,
            softcap=layer.softcap, return_lse=True,
            log_weights=None if log_weights is None else log_weights.gather(-1, order),
        ))  # fmt: skip
    return merge(*map(torch.stack, zip(*parts, strict=True)))[0][0]


def _stored(layer: CapturedLayer, bits: int) -> Attend:
    """Attention of queries over lists, for keys and values stored in `bits`."""
    keys, values = layer.keys[None].float(), layer.values[None].float()
    if bits == 16:
        return partial(attend, k=keys.bfloat16().float(), v=values.bfloat16().float())
    row_format = RowFormat(bits, keys.shape[-1], values.shape[-1])
    return partial(attend_rows, rows=quantise(keys, values, bits), row_format=row_format)

"""Error against bytes, where both can be worked out by other means."""

import pytest
import torch

from hashattn.evaluation.measures.quantisation import quantisation_errors
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.kernels import RowFormat, dequantise, quantise
from hashattn.selectors import make_selector

WINDOW = dict(sink=2, local=4)


def captured(values: bool = True) -> CapturedLayer:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 6, 16), (2, 300, 16), (2, 300, 32)
    queries, keys, found = (torch.randn(shape, generator=generator) for shape in shapes)
    positions = torch.arange(294, 300)
    return CapturedLayer(1, queries, positions, keys, scaling=0.5, values=found if values else None)


def rows(layer=None, **changes):
    settings = dict(heavy=[40], bits=(16, 8, 4), exact=(0, 300)) | WINDOW | changes
    found = quantisation_errors([layer or captured()], make_selector("oracle"), **settings)
    return {(row["bits"], row["exact"]): row for row in found}


def test_all_tokens_exact_have_the_error_of_selection_alone():
    found, oracle = rows(), make_selector("oracle")
    known = selection_metrics([captured()], {"o": oracle}, [40], **WINDOW)[0]["output_error"]
    for bits in (16, 8, 4):
        row = found[bits, 300]
        assert row["output_error"] == pytest.approx(known, abs=1e-5) and row["added_error"] < 1e-5


def test_error_rises_and_bytes_fall_with_fewer_bits():
    found = rows()
    bytes_a_token = [2 * 2 * (16 + 32), 2 * (16 + 32 + 4), 2 * ((16 + 32) // 2 + 4)]
    assert [found[bits, 0]["bytes"] for bits in (16, 8, 4)] == bytes_a_token
    added = [found[bits, 0]["added_error"] for bits in (16, 8, 4)]
    assert 1e-5 < added[0] < added[1] < 0.02 < added[2] < 0.3
    assert found[4, 0]["output_error"] > found[16, 0]["output_error"]


@pytest.mark.parametrize("bits", [8, 4])
def test_added_error_of_all_tokens_is_that_of_softmax_over_stored_ones(bits):
    """Every candidate is read: attention in a loop over query heads, in float64."""
    layer = captured()
    dims = layer.keys.shape[-1], layer.values.shape[-1]
    stored = dequantise(
        quantise(layer.keys[None], layer.values[None], bits), RowFormat(bits, *dims)
    )
    errors = []
    for head, row in ((h, r) for h in range(4) for r in range(6)):
        outputs = []
        for keys, values in ((layer.keys, layer.values), (stored[0][0], stored[1][0])):
            keys, values = (x[head // 2, : 295 + row].double() for x in (keys, values))
            logits = keys @ layer.queries[head, row].double() * 0.5
            outputs.append(logits.softmax(0) @ values)
        errors.append(float((outputs[1] - outputs[0]).norm() / outputs[0].norm()))
    found = rows(heavy=[294], bits=(bits,), exact=(0,))[bits, 0]
    assert found["added_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert found["output_error"] == pytest.approx(found["added_error"], rel=1e-4)


def test_recent_tokens_alone_may_be_exact():
    found = rows(exact=(0, 50, 300))
    errors = [found[4, exact]["added_error"] for exact in (0, 50, 300)]
    assert errors[0] > errors[1] > errors[2]


def test_invalid_arguments():
    with pytest.raises(ValueError, match="16, 8 or 4"):
        rows(bits=(3,))
    with pytest.raises(ValueError, match="exact"):
        rows(exact=(-1,))
    with pytest.raises(ValueError, match="captured with values=True"):
        rows(captured(values=False))

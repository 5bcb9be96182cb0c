"""Grids against exhaustive search, and the methods that quantise by them against loops."""

import pytest
import torch

from hashattn.hashing import CapturedLayer
from hashattn.selectors.base import KeyView
from hashattn.selectors.double_sparsity import DoubleSparsitySelector
from hashattn.selectors.grids import fit_grid, grid_labels, grid_values
from hashattn.selectors.loki import LokiSelector
from hashattn.selectors.quest import QuestSelector, page_bounds

LAYER, HEADS, KV_HEADS, N, D = 2, 4, 2, 61, 8
GROUP = HEADS // KV_HEADS


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(seed=1):
    keys = drawn(KV_HEADS, N, D, seed=seed) * 1.4 ** torch.arange(D) + 0.5
    return CapturedLayer(LAYER, drawn(HEADS, 9, D, seed=7), torch.arange(N - 9, N), keys, 0.3)


def nearest(value, grid, bits):
    low, step = (float(part) for part in grid)
    points = [low + step * label for label in range(2**bits)]
    return min(points, key=lambda point: abs(point - float(value)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_labels_are_of_the_nearest_point_and_values_beyond_the_grid_are_its_ends(bits):
    grid = torch.stack([drawn(KV_HEADS, 3, seed=2), drawn(KV_HEADS, 3, seed=3).abs() / 2**bits], 1)
    x = drawn(2, KV_HEADS, 20, 3, seed=4) * 3
    labels = grid_labels(x, grid, bits)
    assert labels.dtype == torch.uint8 and int(labels.max()) == 2**bits - 1
    found = grid_values(labels, grid)
    for at in [(0, 0, 0, 0), (1, 1, 5, 2), (0, 1, 19, 1), (1, 0, 7, 0)]:
        expected = nearest(x[at], grid[at[1], :, at[3]], bits)
        assert float(found[at]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_fitted_grid_has_less_error_than_the_whole_range_and_nearly_the_least(bits):
    values = torch.cat([drawn(1, 4000, 2), torch.full((1, 1, 2), 30.0)], 1)  # one far out
    grid = fit_grid(values, bits)

    def error(low, step):
        candidate = torch.tensor([[[low, low], [step, step]]])
        rounded = grid_values(grid_labels(values[None], candidate, bits), candidate)[0]
        return (rounded - values).square().sum(1)[0]

    found = grid_values(grid_labels(values[None], grid, bits), grid)[0]
    found = (found - values).square().sum(1)[0]
    whole = error(float(values.min()), float(values.max() - values.min()) / (2**bits - 1))
    searched = torch.stack([
        error(low / 4, (high - low) / 4 / (2**bits - 1))
        for low in range(-16, 0) for high in range(2, 122, 2)
    ]).amin(0)  # fmt: skip
    assert (found < whole).all()
    assert (found < searched * 1.3).all()


def test_equal_values_make_a_finite_grid():
    grid = fit_grid(torch.full((1, 5, 2), 1.5), 2)
    found = grid_values(grid_labels(torch.full((1, 1, 3, 2), 1.5), grid, 2), grid)
    assert torch.allclose(found, torch.tensor(1.5))


@pytest.mark.parametrize("bits", [2, 4])
def test_quest_rounds_bounds_to_the_nearest_point_of_their_channel(bits):
    rows, other = captured(), captured(seed=11)
    selector = QuestSelector.calibrate([rows, other], page=4, bits=bits)
    grid = selector.grids[LAYER]
    queries, keys = drawn(1, HEADS, 2, D, seed=5), rows.keys[None]
    found = selector.scores(LAYER, queries, KeyView(keys), 1.0)
    low, high = page_bounds(keys, 4)
    for head, row, token in [(0, 0, 0), (1, 1, 17), (3, 0, 60), (2, 1, 33)]:
        expected, kv = 0.0, head // GROUP
        for channel in range(D):
            ends = [nearest(bound[0, kv, token // 4, channel], grid[kv, :, channel], bits)
                    for bound in (low, high)]  # fmt: skip
            q = float(queries[0, head, row, channel])
            expected += max(q, 0) * ends[1] + min(q, 0) * ends[0]
        assert float(found[0, head, row, token]) == pytest.approx(expected, abs=1e-3)


def test_quest_with_grids_costs_its_bounds_and_nothing_else():
    selector = QuestSelector.calibrate([captured()], page=4, bits=2)
    assert selector.nominal_bits(1, 64) == 64
    assert selector.needs == "calibration" and QuestSelector().needs == "nothing"
    others = QuestSelector.calibrate([captured(seed=3)], page=4, bits=2)
    assert selector.weights_sha256() != others.weights_sha256()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loki_of_few_bits_uses_the_nearest_point_of_each_component(bits):
    rows = captured()
    selector = LokiSelector.calibrate([rows], components=3, bits=bits)
    queries, keys = drawn(1, HEADS, 2, D, seed=5), rows.keys[None]
    view = KeyView(keys, selector.encode_keys(LAYER, keys))
    found = selector.scores(LAYER, queries, view, 0.5)
    for head, row, token in [(0, 0, 0), (1, 1, 17), (3, 0, 60)]:
        kv, total = head // GROUP, 0.0
        for component in range(3):
            axis = selector.basis[LAYER][kv, :, component]
            on_key = float(rows.keys[kv, token] @ axis)
            point = nearest(on_key, selector.grids[LAYER][kv, :, component], bits)
            total += float(queries[0, head, row] @ axis) * point
        assert float(found[0, head, row, token]) == pytest.approx(total * 0.5, abs=1e-3)
    assert selector.nominal_bits(4, 64) == 3 * bits


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_double_sparsity_on_grids_uses_the_nearest_point_of_each_channel(layout):
    rows = captured()
    selector = DoubleSparsitySelector.calibrate([rows], 3, 4, layout, grid=True)
    queries, keys = drawn(1, HEADS, 2, D, seed=5), rows.keys[None]
    view = KeyView(keys, selector.encode_keys(LAYER, keys))
    found = selector.scores(LAYER, queries, view, 1.0)
    for head, row, token in [(0, 0, 0), (1, 1, 17), (3, 0, 60)]:
        own = head if layout == "per_query_head" else head // GROUP
        total = 0.0
        for place, channel in enumerate(selector.channels[LAYER][own].tolist()):
            point = nearest(rows.keys[head // GROUP, token, channel],
                            selector.grids[LAYER][own, :, place], 4)  # fmt: skip
            total += float(queries[0, head, row, channel]) * point
        assert float(found[0, head, row, token]) == pytest.approx(total, abs=1e-3)
    copies = GROUP if layout == "per_query_head" else 1
    assert selector.nominal_bits(GROUP, D) == copies * 12
    assert selector.parameters()["grid"] is True


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QuestSelector(bits=4), "need the grids of QuestSelector.calibrate"),
        (lambda: LokiSelector({0: torch.eye(4)[None]}, bits=4), "need the grids of LokiSelector"),
        (lambda: LokiSelector({0: torch.eye(4)[None]}, bits=3), "bits = 3"),
        (lambda: QuestSelector.calibrate([]), "calibration got no captured layers"),
        (lambda: QuestSelector.calibrate([captured()], bits=4).scores(
            0, drawn(1, HEADS, 1, D), KeyView(drawn(1, KV_HEADS, 3, D)), 1.0),
         r"layer 0 has no calibrated grids, only \[2\]"),
    ],
)  # fmt: skip
def test_what_has_no_grid_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()

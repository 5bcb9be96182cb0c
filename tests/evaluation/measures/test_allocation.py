"""Allocation of the heavy budget against exhaustive search and a planted need."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from hashattn import Budget
from hashattn.evaluation.measures.allocation import allocate, divide, split
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.selectors import fit_slopes, make_selector

HEADS, KV_HEADS, N, D, SINK, LOCAL = 4, 2, 128, 8, 2, 3


def captured(layer, sharpness):
    """Queries whose attention is sharper in KV head 0 than in 1, or the other way."""
    generator = torch.Generator().manual_seed(layer)
    queries = torch.randn(HEADS, 6, D, generator=generator)
    queries = queries * torch.tensor(sharpness).repeat_interleave(2)[:, None, None]
    keys, values = torch.randn(2, KV_HEADS, N, D, generator=generator)
    positions = torch.arange(N - 6, N)
    return CapturedLayer(layer, queries, positions, keys, D**-0.5, None, values)


def test_division_is_the_best_of_all_divisions():
    """Convex curves on a grid: no other division with the same mean has a smaller sum."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    errors = {"a": [9, 5, 3, 2, 1.5, 1.25, 1.125], "b": [4, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4],
              "c": [8, 4, 1, 0.6, 0.4, 0.3, 0.25]}  # fmt: skip
    curves = {name: list(zip(grid, values, strict=True)) for name, values in errors.items()}
    given = divide(curves)
    assert sum(given.values()) == pytest.approx(3.0)

    def total(choice):
        return sum(errors[name][grid.index(x)] for name, x in zip(errors, choice, strict=True))

    best = min((c for c in product(grid, repeat=3) if sum(c) == 3), key=total)
    assert tuple(given[name] for name in errors) == best


def test_a_dent_in_a_curve_is_bridged():
    """The middle point of b lies above the line between its ends: its tokens pay only together."""
    curves = {"a": [(0.0, 1.0), (1.0, 0.5), (2.0, 0.4)], "b": [(0.0, 4.0), (1.0, 3.9), (2.0, 1.0)]}
    assert divide(curves) == {"a": 0.0, "b": 2.0}


def test_budgets_go_where_attention_is_spread_and_errors_fall():
    layers = [captured(0, (12.0, 1.0)), captured(1, (1.0, 12.0))]
    oracle = make_selector("oracle", layout="per_kv_head")
    shares = allocate(layers, oracle, 16, SINK, LOCAL)
    assert shares[0][0] < 0.5 < shares[0][1] and shares[1][1] < 0.5 < shares[1][0]
    assert sum(map(sum, shares)) == pytest.approx(4.0)

    def error(shares):
        rows = selection_metrics(layers, {"oracle": oracle}, [16], SINK, LOCAL, shares=shares)
        return [sum(row[name] for row in rows) / 2 for name in ("output_error", "density")]

    even, divided = error(None), error(shares)
    assert divided[0] < even[0] and divided[1] == pytest.approx(even[1], rel=0.03)


def test_what_cannot_be_divided_is_refused():
    layer, oracle = captured(0, (1.0, 1.0)), make_selector("oracle")
    with pytest.raises(ValueError, match=r"layers \[0\] were captured without values"):
        allocate([replace(layer, values=None)], oracle, 4)
    with pytest.raises(ValueError, match="heavy = 0"):
        allocate([layer], oracle, 0)


def test_a_head_draws_where_its_estimates_are_good_and_ranks_where_they_are_not():
    layers = [captured(0, (1.0, 1.0))]
    exact = split(layers, make_selector("oracle", layout="per_kv_head"), 24, SINK, LOCAL)
    assert min(exact[0]) > 0
    fitted = fit_slopes(make_selector("lsh", bits=1024), layers, SINK, LOCAL)
    absurd = torch.stack([fitted.slopes[0][0], 30 * fitted.slopes[0][1]])
    found = split(layers, fitted._with(slopes={0: absurd}), 24, SINK, LOCAL, spread=1 / 4)
    assert found[0][0] > 0 == found[0][1]
    # where a single step's error is all that counts, estimates by random planes do not pay at all
    assert split(layers, fitted, 24, SINK, LOCAL, spread=1.0) == ((0.0, 0.0),)
    # what only varies costs nothing: then all that is measured is bias, and drawing has less
    assert min(split(layers, fitted, 24, SINK, LOCAL, spread=0.0)[0]) > 0
    budget = Budget(SINK, LOCAL, heavy=24, sampled=found)
    assert budget.sampled == found


def test_a_split_needs_estimates_values_and_tokens():
    layers = [captured(0, (3.0, 3.0))]
    with pytest.raises(ValueError, match="fit_slopes"):
        split(layers, make_selector("lsh"), 24, SINK, LOCAL)
    with pytest.raises(ValueError, match="heavy = 0"):
        split(layers, make_selector("oracle"), 0, SINK, LOCAL)
    with pytest.raises(ValueError, match=r"layers \[0\] were captured without values"):
        split([replace(layers[0], values=None)], make_selector("oracle"), 24, SINK, LOCAL)

"""Budgets and the token sets that they define."""

import pytest
import torch

from hashattn.attention.budget import Budget
from hashattn.attention.tokens import token_sets, visible_tokens


def test_density_counts_sink_and_local():
    budget = Budget(sink=4, local=28, density=1 / 16)
    assert [budget.heavy_tokens(n) for n in (64, 512, 1024, 4096)] == [0, 0, 32, 224]
    assert [budget.total(n) for n in (8, 512, 1024, 4096)] == [8, 32, 64, 256]


@pytest.mark.parametrize("budget", [Budget(heavy=7), Budget(2, 3, density=0.1), Budget(density=1)])
def test_tensors_agree_with_integers(budget):
    lengths = torch.arange(0, 2000, 7)
    for method in (budget.heavy_tokens, budget.total):
        assert method(lengths).tolist() == [method(n) for n in lengths.tolist()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one"),
        ({"heavy": 3, "density": 0.5}, "exactly one"),
        ({"heavy": -1}, "heavy=-1"),
        ({"heavy": 1.0}, "heavy=1.0"),
        ({"heavy": 1, "sink": -1}, "sink=-1"),
        ({"heavy": 1, "local": 0}, "local=0"),
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.5}, "density=1.5"),
    ],
)
def test_invalid_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_token_sets_count_visible_tokens():
    """Row 0 sees tokens 2..8 with a hole at 5; row 1 one token more."""
    mask = torch.zeros(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 0, [2, 3, 4, 6, 7, 8]] = True
    mask[..., 1, [2, 3, 4, 6, 7, 8, 9]] = True
    sets = token_sets(mask, Budget(sink=1, local=2, heavy=2))
    assert sets.visible.tolist() == [[6, 7]]
    assert [row.nonzero().flatten().tolist() for row in sets.always[0, 0]] == [[2, 7, 8], [2, 8, 9]]
    candidates = [row.nonzero().flatten().tolist() for row in sets.candidates[0, 0]]
    assert candidates == [[3, 4, 6], [3, 4, 6, 7]]
    assert sets.heavy.tolist() == [[2, 2]]


def test_no_mask_is_causal():
    visible = visible_tokens(None, 3, 5, torch.device("cpu"))
    assert visible[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]

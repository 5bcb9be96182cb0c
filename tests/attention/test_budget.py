"""Budgets and the token sets that they define."""

import pytest
import torch

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan, spans_of


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
        ({"heavy": -1}, "heavy = -1"),
        ({"heavy": 1.0}, "heavy = 1.0"),
        ({"heavy": 1, "sink": -1}, "sink = -1"),
        ({"heavy": 1, "local": 0}, "local = 0"),
        ({"density": 0.0}, "density = 0.0"),
        ({"density": 1.5}, "density = 1.5"),
        ({"heavy": 2**70}, "heavy = 1180591620717411303424: must be .* 2147483647"),
        ({"heavy": 2**31}, "heavy = 2147483648: must be an integer from 0 to"),
        ({"heavy": 1, "sink": 2**40}, "sink = 1099511627776: must be"),
        ({"heavy": True}, "heavy = True: must be"),
        ({"density": "a"}, r"density = 'a': must be a number in \(0, 1\]"),
        ({"density": True}, "density = True: must be"),
        ({"density": float("nan")}, "density = nan: must be"),
        ({"density": [0.5]}, r"density = \[0.5\]: must be"),
        ({"density": 1j}, "density = 1j: must be"),
        ({"heavy": 1, "shares": ()}, "factors for each layer"),
        ({"heavy": 1, "shares": 5}, "shares = 5: must be a list of factors"),
        ({"heavy": 1, "shares": [["a"]]}, r"shares = \[\['a'\]\]: must be"),
        ({"heavy": 1, "shares": ["12"]}, "shares = .* must be a list"),
        ({"heavy": 1, "shares": [1.0]}, "shares = .* must be a list"),
        ({"heavy": 1, "shares": [[]]}, "shares = .* must be a list"),
        ({"heavy": 1, "shares": [[True]]}, "shares = .* must be a list"),
        ({"heavy": 1, "shares": [[float("inf")]]}, "shares = .* must be a list"),
        ({"heavy": 1, "shares": ((1.0, 1.0), (2.0, 0.5, 0.5))}, "one for all"),
        ({"heavy": 1, "shares": ((-1.0, 3.0),)}, "at least 0"),
        ({"heavy": 1, "shares": ((1.0,), (0.5,))}, "must be 1 on average; their mean is 0.7500"),
    ],
)
def test_invalid_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def plan(mask, budget, batch=1, q_len=2, n=10):
    return make_plan(mask, batch, q_len, n, torch.device("cpu"), budget)


def rows(mask):
    return [row.nonzero().flatten().tolist() for row in mask[0, 0]]


def test_a_choice_counts_visible_tokens():
    """Row 0 sees tokens 2..8 with a hole at 5; row 1 one token more."""
    mask = torch.zeros(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 0, [2, 3, 4, 6, 7, 8]] = True
    mask[..., 1, [2, 3, 4, 6, 7, 8, 9]] = True
    made = plan(mask, Budget(sink=1, local=2, heavy=2))
    assert made.spans is None and made.visible.tolist() == [[6, 7]]
    assert rows(made.mandatory) == [[2, 7, 8], [2, 8, 9]]
    assert rows(made.candidates) == [[3, 4, 6], [3, 4, 6, 7]]
    assert made.heavy.tolist() == [[[2, 2]]] and made.width == 5


def test_no_mask_is_causal():
    made = plan(None, Budget(sink=1, local=1, density=0.7), batch=2, q_len=3, n=5)
    assert made.spans.tolist() == 2 * [[[0, 3], [0, 4], [0, 5]]]
    assert rows(made.seen) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert rows(made.mandatory) == [[0, 2], [0, 3], [0, 4]]
    assert made.heavy.tolist() == 2 * [[[0, 0, 1]]] and made.width == 3


def test_padding_on_the_left_is_a_span():
    mask = torch.ones(3, 1, 2, 8, dtype=torch.bool).tril(diagonal=6)
    mask[1, ..., :3] = mask[2] = False
    made = plan(mask, Budget(sink=2, local=1, heavy=9), batch=3, n=8)
    assert made.spans.tolist() == [[[0, 7], [0, 8]], [[3, 7], [3, 8]], [[0, 0], [0, 0]]]
    assert torch.equal(made.seen, mask) and made.visible.tolist() == [[7, 8], [4, 5], [0, 0]]
    assert made.mandatory[1, 0].int().tolist() == [
        [0, 0, 0, 1, 1, 0, 1, 0],
        [0, 0, 0, 1, 1, 0, 0, 1],
    ]


def test_holes_are_no_spans():
    mask = torch.tensor([[[[True, False, True]]], [[[False, True, True]]]])
    assert spans_of(mask) is None
    assert spans_of(mask[1:]).tolist() == [[[1, 3]]]


def test_a_layer_gets_its_shares():
    budget = Budget(sink=1, local=2, heavy=5, shares=((0.5, 1.5), (0.2,), (1.8,)))
    whole = plan(None, budget, batch=2)
    assert budget.of_layer(whole, 0, 2, 2).heavy.tolist() == 2 * [[[2, 2], [7, 7]]]
    assert budget.of_layer(whole, 0, 2, 4).heavy[0, :, 0].tolist() == [2, 2, 7, 7]
    assert budget.of_layer(whole, 1, 2, 4).heavy[0, :, 0].tolist() == 4 * [1]
    assert [budget.of_layer(whole, i, 2, 2).width for i in (0, 1, 2)] == [10, 4, 10]
    assert Budget(heavy=5).of_layer(whole, 9, 2, 2) is whole
    with pytest.raises(ValueError, match="3 KV heads of layer 0"):
        budget.of_layer(whole, 0, 3, 3)
    with pytest.raises(ValueError, match="2 KV heads of layer 3"):
        budget.of_layer(whole, 3, 2, 2)

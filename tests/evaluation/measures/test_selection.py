"""Recall and attention mass against loops over heads and rows."""

import math
from dataclasses import replace

import pytest
import torch

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.kernels import indices_to_mask
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView

HEADS, KV_HEADS, N, D = 4, 2, 40, 8
SINK, LOCAL, HEAVY = 2, 3, 5


def captured(positions=(2, 7, 20, 33, 39), softcap=None):
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(HEADS, len(positions), D, generator=generator) * 2
    keys = torch.randn(KV_HEADS, N, D, generator=generator)
    return CapturedLayer(3, queries, torch.tensor(positions), keys, D**-0.5, softcap)


def by_hand(layer, scores, top):
    """Means over heads and rows, with plain Python sorting; scores[list][row][token]."""
    recalls, heavy_masses, masses = [], [], []
    for head in range(HEADS):
        for row, position in enumerate(layer.positions.tolist()):
            candidates = [j for j in range(SINK, N) if j <= position - LOCAL]
            if not candidates:
                continue
            logits = [
                float(layer.queries[head, row].double() @ layer.keys[head // 2, j].double())
                * layer.scaling for j in range(position + 1)
            ]  # fmt: skip
            if layer.softcap:
                logits = [layer.softcap * math.tanh(x / layer.softcap) for x in logits]
            weights = [math.exp(x) for x in logits]
            own = scores[head * len(scores) // HEADS][row]
            chosen = set(sorted(candidates, key=lambda j: (-own[j], j))[:HEAVY])
            best = sorted(candidates, key=lambda j: (-logits[j], j))[:top]
            recalls.append(len(chosen.intersection(best)) / len(best))
            outside = sum(weights[j] for j in candidates)
            heavy = sum(weights[j] for j in chosen)
            heavy_masses.append(heavy / outside)
            masses.append((heavy + sum(weights) - outside) / sum(weights))
    return [sum(x) / len(x) for x in (recalls, heavy_masses, masses)]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_measures_agree_with_loops(softcap):
    layer = captured(softcap=softcap)
    selector = make_selector("lsh", bits=32)
    row = selection_metrics([layer], {"lsh": selector}, [HEAVY], SINK, LOCAL, top=(4, 6))[0]
    codes = selector.encode_keys(3, layer.keys[None])
    scores = selector.scores(3, layer.queries[None], KeyView(layer.keys[None], codes), 1.0)[0]
    for top in (4, 6):
        expected = by_hand(layer, scores.tolist(), top)
        found = [row[f"recall@{top}"], row["heavy_mass"], row["mass"]]
        assert found == pytest.approx(expected, abs=1e-5)
    assert row["queries"] == 4  # the row at position 2 sees sink and local tokens only
    assert (row["method"], row["layer"], row["length"], row["bits"]) == ("lsh", 3, N, 32)


def test_the_oracle_finds_everything_it_can():
    selectors = {"oracle": make_selector("oracle"), "window": make_selector("window")}
    rows = selection_metrics([captured()], selectors, [4, N], SINK, LOCAL, top=(4, 8))
    small, full, window, _ = rows
    assert small["recall@4"] == 1.0 and 0.5 <= small["recall@8"] < 1.0
    assert full["recall@8"] == full["heavy_mass"] == 1.0
    assert full["mass"] == pytest.approx(1.0)
    assert window["recall@4"] == window["heavy_mass"] == 0.0 and 0 < window["mass"] < 1


def test_more_rows_than_fit_at_once_give_the_same_means(monkeypatch):
    layer = captured(tuple(range(10, 40)))
    arguments = ([layer], {"quest": make_selector("quest", page=2)}, [3], SINK, LOCAL)
    together = selection_metrics(*arguments)[0]
    monkeypatch.setattr("hashattn.evaluation.measures.selection.ROWS_AT_ONCE", 7)
    assert selection_metrics(*arguments)[0] == pytest.approx(together)


def test_rows_that_see_no_candidate_are_refused():
    with pytest.raises(ValueError, match="layer 3.*longer sequence"):
        selection_metrics([captured((1, 4))], {"oracle": make_selector("oracle")}, [4], SINK, LOCAL)


def test_membership_ignores_padding():
    indices = torch.tensor([[[[0, 2, -1], [1, -1, -1]]]], dtype=torch.int32)
    expected = torch.tensor([[[[1, 0, 1, 0], [0, 1, 0, 0]]]], dtype=torch.bool)
    assert torch.equal(indices_to_mask(indices, 4), expected)


def whole(layer, positions):
    """Every row of a sequence captured, and the same with some rows left out."""
    rows = torch.tensor(positions)
    return CapturedLayer(3, layer.queries[:, rows], rows, layer.keys, layer.scaling)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("h2o", {}), ("snapkv", {"window": 4}), ("infllm", {"block": 4, "window": 8})],
)
def test_observing_selectors_see_the_prompt_and_then_each_row_alone(monkeypatch, name, parameters):
    monkeypatch.setattr("hashattn.evaluation.measures.selection.ROWS_AT_ONCE", 2)
    layer, selector = captured(range(N)), make_selector(name, **parameters)
    asked = [25, 30, 38]
    table = selection_metrics(
        [whole(layer, [*range(20), *asked])],
        {name: selector},
        [HEAVY],
        SINK,
        LOCAL,
        (4,),
        prompt=20,
    )
    prompt = KeyView(layer.keys[None, :, :20])
    state = selector.observe(3, layer.queries[None, :, :20], prompt, layer.scaling)
    measured = whole(layer, asked)
    scores = torch.full((KV_HEADS, len(asked), N), -torch.inf)
    for row, position in enumerate(asked):
        view = KeyView(layer.keys[None, :, : position + 1], state)
        own = selector.scores(3, layer.queries[None, :, [position]], view, layer.scaling)
        scores[:, row, : position + 1] = own[0, :, 0]
    found = [table[0]["recall@4"], table[0]["heavy_mass"], table[0]["mass"]]
    assert found == pytest.approx(by_hand(measured, scores.tolist(), 4), abs=1e-5)
    assert table[0]["queries"] == len(asked)


def test_a_prompt_is_not_measured_by_any_selector():
    layer, oracle = captured(range(N)), {"oracle": make_selector("oracle")}
    later = selection_metrics([whole(layer, range(30, N))], oracle, [4], SINK, LOCAL)
    assert selection_metrics([layer], oracle, [4], SINK, LOCAL, prompt=30) == later
    with pytest.raises(ValueError, match="prompt of 40"):
        selection_metrics([layer], oracle, [4], SINK, LOCAL, prompt=N)


@pytest.mark.parametrize(("positions", "prompt"), [(range(N), 0), ([*range(5, N)], 20)])
def test_observing_selectors_need_every_query_of_a_prompt(positions, prompt):
    layer = whole(captured(range(N)), positions)
    with pytest.raises(ValueError, match=f"prompt = {prompt}: selector 'h2o'"):
        selection_metrics([layer], {"h2o": make_selector("h2o")}, [4], SINK, LOCAL, prompt=prompt)


@pytest.mark.parametrize("method", ["lsh", "residual"])
def test_output_error_and_density_by_hand(method):
    """Attention over what was read, head by head in float64; sampled tokens stand for others."""
    layer = captured(positions=(20, 39))
    values = torch.randn(KV_HEADS, N, D, generator=torch.Generator().manual_seed(9))
    layer = replace(layer, values=values)
    selector = make_selector("lsh", bits=32)
    if method == "residual":
        selector = make_selector("residual", base=selector, share=0.6)
    row = selection_metrics([layer], {method: selector}, [HEAVY], SINK, LOCAL)[0]
    errors, densities = [], []
    for number, position in enumerate(layer.positions.tolist()):
        n = position + 1
        keys, asked = layer.keys[None, :, :n], layer.queries[None, :, number : number + 1]
        view = KeyView(keys, selector.encode_keys(3, keys))
        choice = make_plan(None, 1, 1, n, keys.device, Budget(SINK, LOCAL, heavy=HEAVY))
        indices, weights = selector.sample(3, asked, view, layer.scaling, choice)
        for head in range(HEADS):
            tokens = indices[0, head // 2, 0].long()
            k, v = layer.keys[head // 2, :n].double(), values[head // 2, :n].double()
            logits = k @ layer.queries[head, number].double() * layer.scaling
            dense = logits.softmax(0) @ v
            extra = 0 if weights is None else weights[0, head // 2, 0].double()
            sparse = (logits[tokens] + extra).softmax(0) @ v[tokens]
            errors.append(((sparse - dense).norm() / dense.norm()).item())
            densities.append(len(tokens) / n)
    assert row["output_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert row["density"] == pytest.approx(sum(densities) / len(densities))


def test_without_values_there_is_no_output_error():
    row = selection_metrics([captured()], {"lsh": make_selector("lsh", bits=32)}, [4], SINK, LOCAL)[
        0
    ]
    assert "output_error" not in row and 0 < row["density"] < 1


def test_rows_by_head_are_the_parts_of_the_mean():
    layer = replace(captured(), values=torch.randn(KV_HEADS, N, D))
    quest = make_selector("quest", page=2, layout="per_kv_head")
    arguments = ([layer], {"quest": quest}, [HEAVY], SINK, LOCAL)
    whole, heads = selection_metrics(*arguments)[0], selection_metrics(*arguments, by_head=True)
    assert [row.pop("head") for row in heads] == [0, 1]
    for name, value in whole.items():
        if isinstance(value, float):
            assert sum(row[name] for row in heads) / 2 == pytest.approx(value), name
    alone = replace(layer, queries=layer.queries[2:], keys=layer.keys[1:], values=layer.values[1:])
    assert selection_metrics([alone], *arguments[1:])[0] == pytest.approx(heads[1])


@pytest.mark.parametrize("method", ["lsh", "residual"])
def test_shares_divide_the_budget(method):
    """Each head measured as if all heads had its budget."""
    layer, selector = captured((33, 39)), make_selector("lsh", bits=32)
    if method == "residual":
        selector = make_selector("residual", base=selector)
    shares = ((1.0,), (1.0,), (1.0,), (0.4, 1.6))
    divided = selection_metrics(
        [layer], {"m": selector}, [5], SINK, LOCAL, by_head=True, shares=shares
    )
    for head, tokens in ((0, 2), (1, 8)):
        alone = selection_metrics([layer], {"m": selector}, [tokens], SINK, LOCAL, by_head=True)[
            head
        ]
        assert divided[head] == alone | {"heavy": 5}

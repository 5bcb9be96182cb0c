"""Recall and attention mass against loops over heads and rows."""

import math

import pytest
import torch

from hashattn.evaluation.recall import recall_rows
from hashattn.kernels import membership
from hashattn.hashing.capture import CapturedLayer
from hashattn.selectors import make_selector

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
    row = recall_rows([layer], {"lsh": selector}, [HEAVY], SINK, LOCAL, top=(4, 6))[0]
    codes = selector.encode_keys(3, layer.keys[None])
    from hashattn.selectors.base import KeyView

    scores = selector.scores(3, layer.queries[None], KeyView(layer.keys[None], codes), 1.0)[0]
    for top in (4, 6):
        expected = by_hand(layer, scores.tolist(), top)
        found = [row[f"recall@{top}"], row["heavy_mass"], row["mass"]]
        assert found == pytest.approx(expected, abs=1e-5)
    assert row["queries"] == 4  # the row at position 2 sees sink and local tokens only
    assert (row["method"], row["layer"], row["length"], row["bits"]) == ("lsh", 3, N, 32)


def test_the_oracle_finds_everything_it_can():
    selectors = {"oracle": make_selector("oracle"), "window": make_selector("window")}
    rows = recall_rows([captured()], selectors, [4, N], SINK, LOCAL, top=(4, 8))
    small, full, window, _ = rows
    assert small["recall@4"] == 1.0 and 0.5 <= small["recall@8"] < 1.0
    assert full["recall@8"] == full["heavy_mass"] == 1.0
    assert full["mass"] == pytest.approx(1.0)
    assert window["recall@4"] == window["heavy_mass"] == 0.0 and 0 < window["mass"] < 1


def test_more_rows_than_fit_at_once_give_the_same_means(monkeypatch):
    layer = captured(tuple(range(10, 40)))
    arguments = ([layer], {"quest": make_selector("quest", page=2)}, [3], SINK, LOCAL)
    together = recall_rows(*arguments)[0]
    monkeypatch.setattr("hashattn.evaluation.recall.ROWS_AT_ONCE", 7)
    assert recall_rows(*arguments)[0] == pytest.approx(together)


def test_rows_that_see_no_candidate_are_refused():
    with pytest.raises(ValueError, match="layer 3.*longer sequence"):
        recall_rows([captured((1, 4))], {"oracle": make_selector("oracle")}, [4], SINK, LOCAL)


def test_membership_ignores_padding():
    indices = torch.tensor([[[[0, 2, -1], [1, -1, -1]]]], dtype=torch.int32)
    expected = torch.tensor([[[[1, 0, 1, 0], [0, 1, 0, 0]]]], dtype=torch.bool)
    assert torch.equal(membership(indices, 4), expected)

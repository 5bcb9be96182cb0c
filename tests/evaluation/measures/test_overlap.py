"""Overlap of a group's true top tokens against Python sets."""

from itertools import combinations
from statistics import mean

import pytest
import torch

from hashattn.evaluation.measures.overlap import group_overlap
from hashattn.hashing.capture import CapturedLayer

HEADS, KV_HEADS, N, D, SINK, LOCAL = 6, 2, 40, 8, 2, 3


def captured(positions, alike=False):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(HEADS, len(positions), D, generator=generator)
    if alike:  # the heads of a group ask the same, at different strengths
        queries = queries[:KV_HEADS].repeat_interleave(3, 0) * torch.rand(HEADS, 1, 1)
    keys = torch.randn(KV_HEADS, N, D, generator=generator)
    return CapturedLayer(2, queries, torch.tensor(positions), keys, 0.3)


def test_agrees_with_sets():
    layer = captured([3, 12, 30, 39])
    found = group_overlap([layer], [4, 20], SINK, LOCAL)
    assert [(row["head"], row["k"], row["length"]) for row in found] == [
        (0, 4, N), (1, 4, N), (0, 20, N), (1, 20, N)
    ]  # fmt: skip
    for row in found:
        shares, unions, chances = [], [], []
        for number, position in enumerate(layer.positions.tolist()):
            candidates = range(SINK, position - LOCAL + 1)
            if len(candidates) < row["k"]:
                continue
            sets = []
            for head in range(3 * row["head"], 3 * row["head"] + 3):
                logit = layer.keys[row["head"]] @ layer.queries[head, number]
                ranked = sorted(candidates, key=lambda j: (-float(logit[j]), j))
                sets.append(set(ranked[: row["k"]]))
            shares.append(mean(len(a & b) / row["k"] for a, b in combinations(sets, 2)))
            unions.append(len(set.union(*sets)) / row["k"])
            chances.append(row["k"] / len(candidates))
        assert row["overlap"] == pytest.approx(mean(shares))
        assert row["union"] == pytest.approx(mean(unions))
        assert row["chance"] == pytest.approx(mean(chances))


def test_heads_that_ask_the_same_agree_wholly():
    for row in group_overlap([captured([30, 39], alike=True)], [5], SINK, LOCAL):
        assert row["overlap"] == row["union"] == 1.0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="sees 30 tokens outside sink 2 and local 3"):
        group_overlap([captured([20])], [30], SINK, LOCAL)
    layer = captured([30])
    alone = CapturedLayer(2, layer.queries[:2], layer.positions, layer.keys, 0.3)
    with pytest.raises(ValueError, match="one query head"):
        group_overlap([alone], [4], SINK, LOCAL)

"""MagicPIG: collisions counted by hand, probabilities against frequencies over many seeds."""

import math

import pytest
import torch

from hashattn import Budget
from hashattn.attention.masks import make_plan
from hashattn.kernels import indices_to_mask
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.magicpig import MagicPIGSelector

HEADS, KV_HEADS, N, D = 4, 2, 50, 12


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, HEADS, 2, D, generator=generator)
    return q, torch.randn(1, KV_HEADS, N, D, generator=generator) + 0.4


def sampled(selector, q, k, heavy=N):
    plan = make_plan(None, 1, 2, N, k.device, Budget(2, 3, heavy=heavy))
    view = KeyView(k, selector.encode_keys(1, k))
    return plan, *selector.sample(1, q, view, 1.0, plan)


class Captured:
    def __init__(self, queries, keys):
        self.layer, self.queries, self.keys = 1, queries, keys


@pytest.mark.parametrize("centred", [False, True])
def test_scores_count_tables_that_collide(centred):
    q, k = states()
    parameters = {"bits": 3, "tables": 7, "seed": 5}
    selector = (
        MagicPIGSelector.calibrate([Captured(q[0], k[0])], **parameters)
        if centred
        else MagicPIGSelector(**parameters)
    )
    found = selector.scores(1, q, KeyView(k, selector.encode_keys(1, k)), 1.0)
    planes = torch.randn(D, 21, generator=torch.Generator().manual_seed(5 * 1_000_003 + 1)).double()
    for head in range(HEADS):
        keys = k[0, head // 2].double()
        keys = keys - keys.mean(0) if centred else keys
        for row in range(2):
            q_signs = (q[0, head, row].double() @ planes > 0).view(7, 3)
            for token in range(N):
                same = (keys[token] @ planes > 0).view(7, 3) == q_signs
                assert found[0, head, row, token] == same.all(-1).sum()
    assert found.max() >= 2


def test_probability_is_the_frequency_over_seeds():
    """How often a token is sampled over 300 seeds, and the weight that it carries each time."""
    q, k = states()
    hits, runs = torch.zeros(HEADS, 2, N), 300
    for seed in range(runs):
        _, indices, weights = sampled(MagicPIGSelector(bits=2, tables=5, seed=seed), q, k)
        hits += indices_to_mask(indices, N)[0]
    for head in range(HEADS):
        for token in range(2, 40):  # neither sink nor local
            angle = math.acos(torch.cosine_similarity(q[0, head, 1], k[0, head // 2, token], dim=0))
            same = (1 - angle / math.pi) ** 2
            u = 1 - (1 - same) ** 5 - 5 * same * (1 - same) ** 4
            error = 4.5 * math.sqrt(u * (1 - u) / runs) + 1e-3
            assert abs(hits[head, 1, token] / runs - u) < error
            place = (indices[0, head, 1] == token).nonzero()
            if len(place):
                assert weights[0, head, 1, place[0, 0]].item() == pytest.approx(-math.log(u), 1e-4)


def test_sink_and_local_are_read_with_weight_one():
    q, k = states()
    plan, indices, weights = sampled(MagicPIGSelector(bits=8, tables=2), q, k)
    mandatory = plan.mandatory[0, 0]
    for head in range(HEADS):
        for row in range(2):
            tokens = indices[0, head, row]
            kept = tokens >= 0
            fixed = mandatory[row].nonzero()[:, 0].tolist()
            assert set(fixed) <= set(tokens[kept].tolist())
            own = {int(t): float(w) for t, w in zip(tokens, weights[0, head, row], strict=True)}
            assert all(own[t] == 0 for t in fixed)


def test_more_than_the_budget_are_thinned_and_weigh_more():
    q, k = states()
    selector = MagicPIGSelector(bits=1, tables=6)
    _, whole, whole_weights = sampled(selector, q, k)
    plan, few, few_weights = sampled(selector, q, k, heavy=8)
    everything, some = indices_to_mask(whole, N), indices_to_mask(few, N)
    assert not (some & ~everything).any()
    candidates = (some & plan.candidates).sum(-1)
    assert candidates.unique().tolist() == [8]
    for head in range(HEADS):
        collided = int((everything & plan.candidates)[0, head, 0].sum())
        for token, weight in zip(few[0, head, 0].tolist(), few_weights[0, head, 0], strict=True):
            if token >= 0 and bool(plan.candidates[0, 0, 0, token]):
                place = (whole[0, head, 0] == token).nonzero()[0, 0]
                before = whole_weights[0, head, 0, place]
                assert weight.item() == pytest.approx(before.item() + math.log(collided / 8), 1e-5)


def test_record_bits_and_bad_parameters():
    q, k = states()
    selector = make_selector("magicpig", bits=10, tables=150)
    assert selector.nominal_bits(4, 128) == 1500
    assert selector.record()["weights_sha256"] is None
    calibrated = MagicPIGSelector.calibrate([Captured(q[0], k[0])])
    assert calibrated.record()["weights_sha256"] and calibrated.record()["parameters"]["centred"]
    with pytest.raises(ValueError, match="tables = 1: must be at least 2"):
        MagicPIGSelector(tables=1)
    with pytest.raises(ValueError, match=r"bits = 16: must be within 1\.\.15"):
        MagicPIGSelector(bits=16)

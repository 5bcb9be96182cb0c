"""Oracle top-p: fewest tokens for a mass, counted by hand from softmax weights in float64."""

import math

import pytest
import torch

from hashattn import Budget
from hashattn.attention.masks import make_plan
from hashattn.kernels import indices_to_mask
from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.oracle_top_p import OracleTopPSelector

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 41, 8
GROUP = HEADS // KV_HEADS
PADDING = [0, 7]
SINK, LOCAL = 2, 3
SCALING = 0.5


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    return q, torch.randn(B, KV_HEADS, N, D, generator=generator)


def chosen(selector, q, k, heavy=N, padding=PADDING):
    visible = torch.arange(N) >= torch.tensor(padding)[:, None]
    view = KeyView(k, visible=visible)
    plan = make_plan(view.causal(ROWS), B, ROWS, N, k.device, Budget(SINK, LOCAL, heavy=heavy))
    return indices_to_mask(selector.select(0, q, view, SCALING, plan), N)


def reference_weights(q, k, first, last):
    exps = {t: math.exp(float(q.double() @ k[t].double()) * SCALING) for t in range(first, last)}
    return {t: e / sum(exps.values()) for t, e in exps.items()}


def reference_set(weights, p, heavy):
    tokens = sorted(weights)
    fixed = set(tokens[:SINK]) | set(tokens[-LOCAL:])
    mass = sum(weights[t] for t in fixed)
    picked = set(fixed)
    for t in sorted(set(tokens) - fixed, key=lambda t: -weights[t]):
        if mass >= p or len(picked) == len(fixed) + heavy:
            break
        picked.add(t)
        mass += weights[t]
    return picked


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize(("p", "heavy"), [(0.5, N), (0.9, N), (0.999, N), (0.9, 4), (0.9, 0)])
def test_the_fewest_tokens_that_reach_p_or_the_cap(layout, p, heavy):
    q, k = states()
    found = chosen(OracleTopPSelector(p, layout), q, k, heavy)
    members = 1 if layout == "per_query_head" else GROUP
    for b in range(B):
        for one in range(HEADS // members):
            for row in range(ROWS):
                total = {}
                for head in range(one * members, (one + 1) * members):
                    span = (PADDING[b], N - ROWS + row + 1)
                    weights = reference_weights(q[b, head, row], k[b, head // GROUP], *span)
                    for t, weight in weights.items():
                        total[t] = total.get(t, 0) + weight / members
                tokens = set(found[b, one, row].nonzero()[:, 0].tolist())
                assert tokens == reference_set(total, p, heavy)


def test_nothing_is_added_where_sink_and_local_reach_p():
    q, k = states()
    k[:, :, :, :] = 0
    k[:, 0, N - 2] = 40 * q[:, 0, -1] / q[:, 0, -1].norm(dim=-1, keepdim=True) ** 2
    found = chosen(OracleTopPSelector(0.9), q, k)
    assert found[:, 0, -1].sum(-1).tolist() == [SINK + LOCAL] * B
    assert (found[:, -1, -1].sum(-1) > SINK + LOCAL).all()  # an even spread needs most tokens


def test_equal_tokens_are_taken_from_the_lowest():
    q, k = states()
    found = chosen(OracleTopPSelector(0.5), q, k * 0, padding=[0, 0])
    for row in range(ROWS):
        seen = N - ROWS + row + 1
        more = math.ceil(0.5 * seen - 1e-9) - SINK - LOCAL
        picked = [*range(SINK + more), *range(seen - LOCAL, seen)]
        assert found[0, 0, row].nonzero()[:, 0].tolist() == picked


def test_a_row_of_padding_reads_nothing():
    q, k = states()
    assert not chosen(OracleTopPSelector(0.9), q, k, padding=[0, N])[1].any()
    assert not chosen(OracleTopPSelector(0.9, "per_kv_head"), q, k, padding=[0, N])[1].any()


def test_record_bits_and_bad_parameters():
    selector = make_selector("oracle_top_p", p=0.8)
    assert selector.record() == {
        "name": "oracle_top_p",
        "parameters": {"p": 0.8, "layout": "per_query_head"},
        "weights_sha256": None,
    }
    assert selector.auxiliary_bits(4, 128) == 0 and selector.read_bits(4, 128) == 2048
    for p in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"p = {p}: must be between 0 and 1"):
            OracleTopPSelector(p)
    with pytest.raises(ValueError, match="layout"):
        OracleTopPSelector(layout="heads")

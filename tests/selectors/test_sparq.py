"""SparQ against loops in float64: channels, temperature, softmax over what a row sees."""

import math

import pytest
import torch

from hashattn.selectors import make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.sparq import SparQSelector

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 37, 8
GROUP = HEADS // KV_HEADS
PADDING = [0, 5]
SCALING = 0.6


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    k = torch.randn(B, KV_HEADS, N, D, generator=generator) * torch.linspace(0.3, 2, D) + 0.2
    visible = torch.arange(N) >= torch.tensor(PADDING)[:, None]
    return q, KeyView(k, visible=visible)


def reference_logit(q, k, channels):
    share = sum(abs(q[c]) for c in channels) / sum(abs(x) for x in q)
    return sum(q[c] * k[c] for c in channels) * SCALING / math.sqrt(share)


def strongest(sizes, count):
    return sorted(range(D), key=lambda c: -sizes[c])[:count]


@pytest.mark.parametrize("channels", [1, 3, D])
def test_query_head_scores_are_the_largest_channels_over_the_temperature(channels):
    q, view = states()
    found = SparQSelector(channels, "per_query_head").scores(0, q, view, SCALING)
    assert found.shape == (B, HEADS, ROWS, N) and found.dtype == torch.float32
    for b in range(B):
        for head in range(HEADS):
            keys = view.keys[b, head // GROUP].tolist()
            for row in range(ROWS):
                own = q[b, head, row].tolist()
                picked = strongest([abs(x) for x in own], channels)
                expected = [reference_logit(own, keys[t], picked) for t in range(N)]
                assert found[b, head, row].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3, D])
def test_kv_head_scores_sum_the_weights_of_a_group_that_shares_channels(channels):
    q, view = states()
    found = SparQSelector(channels).scores(0, q, view, SCALING)
    assert found.shape == (B, KV_HEADS, ROWS, N)
    for b in range(B):
        for kv in range(KV_HEADS):
            keys = view.keys[b, kv].tolist()
            for row in range(ROWS):
                group = q[b, kv * GROUP : (kv + 1) * GROUP, row].tolist()
                picked = strongest([sum(abs(x[c]) for x in group) for c in range(D)], channels)
                expected = [0.0] * N
                seen = range(PADDING[b], N - ROWS + row + 1)
                for own in group:
                    weights = [math.exp(reference_logit(own, keys[t], picked)) for t in seen]
                    for t, weight in zip(seen, weights, strict=True):
                        expected[t] += weight / sum(weights)
                assert found[b, kv, row].tolist() == pytest.approx(expected, abs=1e-6)


def test_all_channels_are_the_exact_logits():
    q, view = states()
    exact = q @ view.keys.repeat_interleave(GROUP, 1).mT * SCALING
    found = SparQSelector(D, "per_query_head").scores(0, q, view, SCALING)
    assert torch.allclose(found, exact, atol=1e-5)


def test_queries_of_zeros_and_rows_that_see_nothing_are_no_nan():
    q, view = states()
    nothing = KeyView(view.keys, visible=torch.zeros(B, N, dtype=torch.bool))
    for layout in ("per_kv_head", "per_query_head"):
        selector = SparQSelector(2, layout)
        assert selector.scores(0, q * 0, view, SCALING).isfinite().all()
        assert selector.scores(0, q, nothing, SCALING).isfinite().all()


def test_equal_channels_are_taken_from_the_lowest():
    keys = torch.eye(D)[None, None]  # token t shows channel t
    scores = SparQSelector(3, "per_query_head").scores(
        0, torch.ones(1, 1, 1, D), KeyView(keys), 1.0
    )
    assert (scores[0, 0, 0] > 0).tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("layout", "channels", "read"),
    [("per_kv_head", 32, 512), ("per_query_head", 16, 1024), ("per_query_head", 64, 2048)],
)
def test_bits_stored_and_read_for_llama_3_1_8b_heads(layout, channels, read):
    selector = SparQSelector(channels, layout)
    assert selector.nominal_bits(4, 128) == 2048
    assert selector.read_bits(4, 128) == read


def test_record_and_bad_parameters():
    selector = make_selector("sparq", channels=4)
    assert selector.record() == {
        "name": "sparq",
        "parameters": {"channels": 4, "layout": "per_kv_head"},
        "weights_sha256": None,
    }
    assert selector.needs == "nothing" and not selector.evicts
    with pytest.raises(ValueError, match="channels = 0: must be at least 1"):
        SparQSelector(0)
    with pytest.raises(ValueError, match="layout = 'heads': must be one of"):
        SparQSelector(layout="heads")
    q, view = states()
    with pytest.raises(ValueError, match=r"channels = 9: must be within 1\.\.8"):
        SparQSelector(9).scores(0, q, view, SCALING)

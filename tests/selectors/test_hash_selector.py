"""HashSelector: scores against bits counted one by one, layouts, records."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.selectors import HashSelector, make_selector
from hashattn.selectors.base import KeyView
from helpers import generate, prompt, tiny_model

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 2, 33, 8


def weights(layout="per_kv_head", bits=64, seed=0):
    config = HashConfig((0, 1), HEADS, KV_HEADS, D, layout, bits, depth=2, hidden=16)
    return HashWeights.random(config, seed)


def tensors():
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(B, HEADS, ROWS, D, generator=generator)
    return queries, torch.randn(B, KV_HEADS, N, D, generator=generator)


def bits_of(maps, head, x):
    """One head's map by hand in float64: linear, SiLU, linear, sign."""
    first, second = (w[head].double() for w in maps.weights)
    hidden = x.double() @ first + maps.biases[0][head].double()
    hidden = hidden / (1 + torch.exp(-hidden))
    return (hidden @ second + maps.biases[1][head].double() > 0).tolist()


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_scores_count_matching_bits(layout):
    maps = weights(layout)
    selector = HashSelector(maps)
    queries, keys = tensors()
    lists = KV_HEADS if layout == "per_kv_head" else HEADS
    index = selector.encode_keys(1, keys)
    found = selector.scores(1, queries, KeyView(keys, index), 1.0)
    expected = torch.zeros(B, lists, ROWS, N, dtype=torch.int32)
    for b in range(B):
        for head in range(HEADS):
            kv, own = head // 2, head * lists // HEADS
            key_bits = [bits_of(maps.maps[1].key, own, keys[b, kv, j]) for j in range(N)]
            for row in range(ROWS):
                query_bits = bits_of(maps.maps[1].query, head, queries[b, head, row])
                for j in range(N):
                    same = sum(x == y for x, y in zip(query_bits, key_bits[j], strict=True))
                    expected[b, own, row, j] += same
    assert selector.lists(HEADS, KV_HEADS) == lists
    assert torch.equal(found, expected)


def test_long_prefills_are_encoded_in_parts_with_the_same_codes(monkeypatch):
    selector = HashSelector(weights())
    _, keys = tensors()
    whole = selector.encode_keys(0, keys)["codes"]
    monkeypatch.setattr("hashattn.selectors.hash.TOKENS_AT_ONCE", 10)
    assert torch.equal(selector.encode_keys(0, keys)["codes"], whole)


@pytest.mark.parametrize(("layout", "bits"), [("per_kv_head", 64), ("per_query_head", 256)])
def test_auxiliary_bits_are_per_kv_head(layout, bits):
    assert HashSelector(weights(layout)).auxiliary_bits(group=4, head_dim=D) == bits


def test_records_name_the_weights():
    maps = weights()
    record = make_selector("hash", weights=maps).record()
    assert record["weights_sha256"] == maps.sha256 != weights(seed=1).sha256
    assert record["parameters"] == {
        "layout": "per_kv_head",
        "bits": 64,
        "depth": 2,
        "scoring": "hamming",
    }
    assert not HashSelector(maps).trained
    trained = HashWeights(maps.config, maps.maps, maps.card | {"trained": True})
    assert HashSelector(trained).trained


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_asymmetric_scores_weigh_bits_by_the_query(layout):
    """Pre-activations of the query times the key's signs, by hand, summed over the group."""
    maps = weights(layout)
    selector = make_selector("hash", weights=maps, scoring="asymmetric")
    queries, keys = tensors()
    index, query = selector.encode_step(1, keys, queries)
    assert query is None
    found = selector.scores(1, queries, KeyView(keys, index), 1.0)
    lists = KV_HEADS if layout == "per_kv_head" else HEADS
    expected = torch.zeros(B, lists, ROWS, N, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            own = head * lists // HEADS
            first, second = (w[head].double() for w in maps.maps[1].query.weights)
            for j in range(N):
                signs = torch.tensor(bits_of(maps.maps[1].key, own, keys[b, head // 2, j]))
                for row in range(ROWS):
                    biases = [bias[head].double() for bias in maps.maps[1].query.biases]
                    hidden = queries[b, head, row].double() @ first + biases[0]
                    real = hidden / (1 + torch.exp(-hidden)) @ second + biases[1]
                    expected[b, own, row, j] += torch.where(signs, real, -real).sum()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_asymmetric_selection_runs_in_a_model_and_is_recorded():
    config = HashConfig((0, 1), 4, 2, 16, "per_kv_head", 32, depth=2, hidden=16)
    selector = make_selector("hash", weights=HashWeights.random(config, 0), scoring="asymmetric")
    model, budget = tiny_model("llama"), Budget(1, 3, heavy=6)
    with attach(model, selector, budget, allow_untrained=True) as run:
        generate(model, prompt())
    assert run.receipt.method["parameters"]["scoring"] == "asymmetric"
    assert run.receipt.sparse_steps[0].read == 10
    with pytest.raises(ValueError, match="scoring = 'cosine' must be one of"):
        make_selector("hash", weights=weights(), scoring="cosine")

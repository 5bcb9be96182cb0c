"""Scores that count the norms of the values: by hand, through the attention, and what they cost."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.hashing.capture import capture
from hashattn.selectors import OracleSelector, SocketSelector, make_selector
from hashattn.selectors.base import KeyView
from hashattn.selectors.rerank import RerankSelector
from helpers import generate, left_padded, prompt, tiny_model

B, HEADS, KV_HEADS, N, D = 2, 4, 2, 12, 8


def states():
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(B, HEADS, 1, D, generator=generator)
    keys = torch.randn(B, KV_HEADS, N, D, generator=generator)
    values = torch.randn(B, KV_HEADS, N, D, generator=generator)
    return queries, keys, values * torch.rand(B, KV_HEADS, N, 1, generator=generator) * 9


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_the_oracle_orders_by_weight_times_norm(layout):
    q, k, v = states()
    oracle = OracleSelector(layout, value_norms=True)
    view = KeyView(k, oracle.encode_values(0, v))
    scores = oracle.scores(0, q, view, 0.3)
    for b in range(B):
        for line in range(scores.shape[1]):
            group = HEADS // scores.shape[1]
            wanted = torch.zeros(N, dtype=torch.float64)
            for head in range(line * group, (line + 1) * group):
                kv = head // (HEADS // KV_HEADS)
                weights = (k[b, kv].double() @ q[b, head, 0].double() * 0.3).softmax(0)
                wanted += weights * v[b, kv].double().norm(dim=-1)
            assert scores[b, line, 0].argsort().tolist() == wanted.argsort().tolist()


def test_without_norms_the_error_says_what_to_do():
    q, k, _ = states()
    for selector in (OracleSelector(value_norms=True), SocketSelector(value_norms=True)):
        index = selector.encode_keys(0, k)
        with pytest.raises(ValueError, match="encode the values"):
            selector.scores(0, q, KeyView(k, index), 1.0)


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_re_ranking_with_norms_is_the_oracle_with_norms(layout):
    """Through the attention: left padding, a prompt that was cached before, decode steps."""
    model, budget = tiny_model("llama"), Budget(1, 3, heavy=5)
    ids, mask = left_padded()
    logits = {}
    quest = make_selector("quest", page=4, layout=layout)
    base = make_selector("lsh", bits=32) if layout == "per_kv_head" else quest
    for name, selector in (
        ("plain", OracleSelector(layout)),
        ("oracle", OracleSelector(layout, value_norms=True)),
        ("rerank", RerankSelector(base, factor=9, value_norms=True)),
    ):
        with attach(model, selector, budget):
            logits[name] = generate(model, ids, mask)[1]
    torch.testing.assert_close(logits["oracle"], logits["rerank"], rtol=0, atol=1e-5)
    assert not torch.allclose(logits["oracle"], logits["plain"], rtol=0, atol=1e-4)


def test_norms_of_a_cache_that_was_filled_before():
    model, budget, ids = tiny_model("llama"), Budget(1, 3, heavy=5), prompt(length=30)
    oracle = OracleSelector(value_norms=True)
    with attach(model, oracle, budget):
        cache = model(ids[:, :-1]).past_key_values
        together = model(ids[:, -1:], past_key_values=cache).logits
    cache = model(ids[:, :-1]).past_key_values
    with attach(model, oracle, budget):
        later = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(later, together, rtol=0, atol=1e-6)
    layer = capture(model, ids[0], values=True)[0]
    stored = cache.layers[0].stores["value_norms"].value[0, :, :, 0].float()
    torch.testing.assert_close(stored[:, :-1], layer.values[:, :-1].norm(dim=-1), rtol=4e-3, atol=0)


def test_norms_are_counted():
    socket = SocketSelector(value_norms=True)
    assert OracleSelector(value_norms=True).auxiliary_bits(2, D) == 16
    assert (
        RerankSelector(make_selector("lsh", bits=64), value_norms=True).auxiliary_bits(2, D) == 80
    )
    once = RerankSelector(socket, value_norms=True)
    assert once.auxiliary_bits(2, D) == socket.auxiliary_bits(2, D) == 144
    assert once.record()["parameters"]["value_norms"] is True

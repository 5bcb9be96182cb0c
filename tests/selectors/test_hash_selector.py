"""HashSelector: scores against bits counted one by one, layouts, records."""

import pytest
import torch

from hashattn import Budget, attach
from hashattn.attention.masks import make_plan
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import indices_to_mask, select
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


LAYOUTS = [("per_kv_head", "per_kv_head"), ("per_kv_head", "per_query_head"),
           ("per_query_head", "per_query_head")]  # fmt: skip


@pytest.mark.parametrize(("codes", "layout"), LAYOUTS)
def test_scores_count_matching_bits(codes, layout):
    maps = weights(codes)
    selector = HashSelector(maps, "hamming", layout)
    queries, keys = tensors()
    lists = KV_HEADS if layout == "per_kv_head" else HEADS
    index = selector.encode_keys(1, keys)
    found = selector.scores(1, queries, KeyView(keys, index), 1.0)
    expected = torch.zeros(B, lists, ROWS, N, dtype=torch.int32)
    for b in range(B):
        for head in range(HEADS):
            kv, code = head // 2, head if codes == "per_query_head" else head // 2
            key_bits = [bits_of(maps.maps[1].key, code, keys[b, kv, j]) for j in range(N)]
            for row in range(ROWS):
                query_bits = bits_of(maps.maps[1].query, head, queries[b, head, row])
                for j in range(N):
                    same = sum(x == y for x, y in zip(query_bits, key_bits[j], strict=True))
                    expected[b, head * lists // HEADS, row, j] += same
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
        "codes": "per_kv_head",
        "bits": 64,
        "depth": 2,
        "scoring": "graded",
        "layout": "per_query_head",
    }
    assert not HashSelector(maps).trained
    trained = HashWeights(maps.config, maps.maps, maps.card | {"trained": True})
    assert HashSelector(trained).trained


def real_scores(maps, codes, layout, queries, keys):
    """Signed pre-activations of the queries (B, lists, rows, bits), and the keys' signs by head."""
    real = torch.zeros(B, HEADS, ROWS, 64, dtype=torch.float64)
    signs = torch.zeros(B, HEADS, N, 64, dtype=torch.bool)
    for b in range(B):
        for head in range(HEADS):
            first, second = (w[head].double() for w in maps.maps[1].query.weights)
            biases = [bias[head].double() for bias in maps.maps[1].query.biases]
            hidden = queries[b, head].double() @ first + biases[0]
            real[b, head] = hidden / (1 + torch.exp(-hidden)) @ second + biases[1]
            code = head if codes == "per_query_head" else head // 2
            signs[b, head] = torch.tensor(bits_of(maps.maps[1].key, code, keys[b, head // 2]))
    if layout == "per_kv_head":
        real, signs = real.unflatten(1, (KV_HEADS, 2)).sum(2), signs[:, ::2]
    return real, signs


@pytest.mark.parametrize(("codes", "layout"), LAYOUTS)
@pytest.mark.parametrize("scoring", ["graded", "asymmetric"])
def test_bits_are_weighed_by_the_query(scoring, codes, layout):
    """By real pre-activations, or by their size in units of which a byte holds the sum and five
    binary digits the largest."""
    maps, (queries, keys) = weights(codes), tensors()
    selector = make_selector("hash", weights=maps, scoring=scoring, layout=layout)
    found = selector.scores(1, queries, KeyView(keys, selector.encode_keys(1, keys)), 1.0)
    real, signs = real_scores(maps, codes, layout, queries, keys)
    if scoring == "asymmetric":
        expected = real @ torch.where(signs, 1.0, -1.0).double().mT
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
        return
    largest, total = real.abs().amax(-1, keepdim=True), real.abs().sum(-1, keepdim=True)
    size = real.abs() * torch.minimum(31 / largest, (255 - real.shape[-1] / 2) / total)
    sure = ((size % 1 - 0.5).abs() > 1e-3).all(-1)[..., None].expand(found.shape)
    assert sure.float().mean() > 0.5  # else a weight may round the other way
    same = (real > 0)[..., None, :] == signs[:, :, None]
    expected = (size.round()[..., None, :] * same).sum(-1).int()
    assert torch.equal(found[sure], expected[sure]) and found.dtype == torch.int32


@pytest.mark.parametrize("scoring", ["hamming", "graded", "asymmetric"])
@pytest.mark.parametrize(("codes", "layout"), LAYOUTS)
def test_selection_runs_in_a_model_and_is_recorded(scoring, codes, layout):
    config = HashConfig((0, 1), 4, 2, 16, codes, 32, depth=2, hidden=16)
    maps = HashWeights.random(config, 0)
    selector = make_selector("hash", weights=maps, scoring=scoring, layout=layout)
    model, budget = tiny_model("llama"), Budget(1, 3, heavy=6)
    with attach(model, selector, budget, allow_untrained=True, keep_steps=1) as run:
        generate(model, prompt())
    parameters = run.receipt.method["parameters"]
    assert (parameters["scoring"], parameters["layout"]) == (scoring, layout)
    assert run.receipt.recent[0].read == 10


def test_a_decode_step_selects_by_its_scores():
    """Straight from codes, and by `select` of the scores: the same lists."""
    maps, (queries, keys) = weights(), tensors()
    plan = make_plan(None, B, ROWS, N, keys.device, Budget(1, 2, heavy=9))
    for scoring in ("hamming", "graded"):
        for layout in ("per_kv_head", "per_query_head"):
            selector = HashSelector(maps, scoring, layout)
            view = KeyView(keys, selector.encode_keys(0, keys))
            found = selector.select(0, queries, view, 1.0, plan)
            scores = selector.scores(0, queries, view, 1.0)
            wanted = select(scores, plan.heavy, plan.candidates, plan.mandatory)
            assert torch.equal(indices_to_mask(found, N), indices_to_mask(wanted, N))


def test_invalid_settings():
    with pytest.raises(ValueError, match="scoring = 'cosine': must be one of"):
        make_selector("hash", weights=weights(), scoring="cosine")
    with pytest.raises(ValueError, match="layout = 'head'"):
        make_selector("hash", weights=weights(), layout="head")
    with pytest.raises(ValueError, match="needs one code per KV head"):
        make_selector("hash", weights=weights("per_query_head"), layout="per_kv_head")


def test_digits_are_not_compared_bit_by_bit():
    weights = HashWeights.random(HashConfig((0,), 4, 2, 16, bits=32, depth=1, folds=3), 0)
    with pytest.raises(ValueError, match='scoring = "hamming" counts matching bits'):
        HashSelector(weights, "hamming")
    assert HashSelector(weights, "asymmetric").scoring == "asymmetric"

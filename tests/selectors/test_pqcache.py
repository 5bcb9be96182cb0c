"""PQCache against k-means and table look-ups in float64 loops, and its store inside a cache."""

import copy
import math

import pytest
import torch
from transformers import DynamicCache

from hashattn import Budget, attach
from hashattn.selectors import make_selector, pqcache
from hashattn.selectors.base import KeyView
from hashattn.selectors.pqcache import PQCacheSelector, ProductCodes
from helpers import generate, left_padded, prompt, tiny_model

B, HEADS, KV_HEADS, ROWS, N, D = 2, 4, 2, 3, 41, 8
GROUP = HEADS // KV_HEADS
PADDING = [0, 6]
SINK = 2
SCALING = 0.6
SMALL = Budget(sink=1, local=3, heavy=6)


def states(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, ROWS, HEADS, D, generator=generator).transpose(1, 2)
    return q, torch.randn(B, KV_HEADS, n, D, generator=generator)


def stored(selector, k, padding=PADDING):
    """The view that a cache would give: a store that was filled before anything was asked."""
    part = selector.encode_keys(0, k)["codes"]
    store = selector.new_store("codes", part)
    store.append(part)
    visible = torch.arange(k.shape[2]) >= torch.tensor(padding)[:, None]
    return KeyView(k, {"codes": store.value}, visible)


def closest(point, centroids):
    return min(
        range(len(centroids)),
        key=lambda c: sum((a - b) ** 2 for a, b in zip(point, centroids[c], strict=True)),
    )


def reference_centroids(points, count, iterations):
    centroids = [points[i * len(points) // count] for i in range(count)]
    for _ in range(iterations):
        owned = [[] for _ in range(count)]
        for point in points:
            owned[closest(point, centroids)].append(point)
        centroids = [
            [sum(column) / len(own) for column in zip(*own, strict=True)] if own else centre
            for own, centre in zip(owned, centroids, strict=True)
        ]
    return centroids


def reference_keys(k, first, end, parts, bits, iterations):
    """Keys (n, D) of one KV head as their centroids say: list of n lists."""
    width, decoded = D // parts, [[] for _ in range(k.shape[0])]
    for part in range(parts):
        points = k[:, part * width : (part + 1) * width].double().tolist()
        centroids = reference_centroids(points[first:end], 2**bits, iterations)
        for token, point in enumerate(points):
            decoded[token] += centroids[closest(point, centroids)]
    return decoded


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize(("parts", "bits", "iterations"), [(2, 3, 10), (4, 2, 1), (1, 4, 0)])
def test_scores_are_products_with_the_centroids(layout, parts, bits, iterations):
    q, k = states()
    selector = PQCacheSelector(parts, bits, iterations, SINK, layout)
    found = selector.scores(0, q, stored(selector, k), SCALING)
    assert found.shape == (B, HEADS if layout == "per_query_head" else KV_HEADS, ROWS, N)
    for b in range(B):
        for kv in range(KV_HEADS):
            keys = reference_keys(k[b, kv], PADDING[b] + SINK, N - ROWS, parts, bits, iterations)
            for row in range(ROWS):
                summed = [0.0] * N
                for head in range(kv * GROUP, (kv + 1) * GROUP):
                    own = q[b, head, row].double().tolist()
                    logits = [
                        SCALING * sum(x * y for x, y in zip(own, key, strict=True)) for key in keys
                    ]
                    if layout == "per_query_head":
                        assert found[b, head, row].tolist() == pytest.approx(logits, abs=1e-5)
                    seen = range(PADDING[b], N - ROWS + row + 1)
                    exps = [math.exp(logits[t]) for t in seen]
                    for t, one in zip(seen, exps, strict=True):
                        summed[t] += one / sum(exps)
                if layout == "per_kv_head":
                    assert found[b, kv, row].tolist() == pytest.approx(summed, abs=1e-6)


def test_a_centroid_for_every_key_is_exact():
    q, k = states(n=16 + SINK + ROWS)
    selector = PQCacheSelector(2, 4, 10, SINK, "per_query_head")
    found = selector.scores(0, q, stored(selector, k, [0, 0]), SCALING)
    exact = q @ k.repeat_interleave(GROUP, 1).mT * SCALING
    assert torch.allclose(found[..., SINK:-ROWS], exact[..., SINK:-ROWS], atol=1e-5)


def test_equal_keys_leave_other_centroids_where_they_are():
    q, k = states()
    selector = PQCacheSelector(2, 3, layout="per_query_head")
    view = stored(selector, k * 0 + 1.5)
    found = selector.scores(0, q, view, SCALING)
    assert (view.index["codes"].centroids == 1.5).all()
    assert torch.allclose(found, (q.sum(-1) * 1.5 * SCALING)[..., None].expand_as(found), atol=1e-5)


@pytest.mark.parametrize("n", [ROWS, ROWS + 1, SINK + ROWS, SINK + ROWS + 1])
def test_fewer_keys_than_centroids(n):
    q, k = states(n=n)
    for padding in ([0, 0], [0, n - 1], [0, n]):
        for layout in ("per_query_head", "per_kv_head"):
            selector = PQCacheSelector(2, 6, sink=SINK, layout=layout)
            assert selector.scores(0, q, stored(selector, k, padding), SCALING).isfinite().all()


def test_later_keys_take_the_codes_of_the_centroids_there_are():
    q, k = states()
    selector = PQCacheSelector(2, 3, sink=SINK)
    store = selector.new_store("codes", k)
    store.append(k[:, :, :20])
    selector.scores(0, q, KeyView(k[:, :, :20], {"codes": store}), SCALING)
    before, codes = store.centroids.clone(), store.codes.clone()
    store.append(k[:, :, 20:])
    selector.scores(0, q, KeyView(k, {"codes": store}), SCALING)
    assert torch.equal(store.centroids, before) and torch.equal(store.codes[:, :, :20], codes)
    for b in range(B):
        for kv in range(KV_HEADS):
            for token in range(20, N):
                for part in range(2):
                    point = k[b, kv, token, part * 4 : part * 4 + 4].double().tolist()
                    centroids = before[b, kv, part].double().tolist()
                    assert int(store.codes[b, kv, token, part]) == closest(point, centroids)


def test_blocks_of_tokens_change_nothing(monkeypatch):
    q, k = states()
    selector = PQCacheSelector(2, 3)
    whole = selector.scores(0, q, stored(selector, k), SCALING)
    monkeypatch.setattr(pqcache, "TOKENS_AT_ONCE", 7)
    assert torch.allclose(selector.scores(0, q, stored(selector, k), SCALING), whole, atol=1e-6)


def test_a_capture_shares_centroids_of_all_its_keys():
    q, k = states()
    selector = PQCacheSelector(2, 3, sink=SINK, layout="per_query_head")
    positions = torch.tensor([7, 20, 40])
    view = KeyView(k, selector.encode_keys(0, k), positions=positions)
    found = selector.scores(0, q, view, SCALING)
    keys = reference_keys(k[0, 1], SINK, N, 2, 3, 10)
    expected = (q[0, 2].double() @ torch.tensor(keys).double().T) * SCALING
    assert torch.allclose(found[0, 2].double(), expected, atol=1e-5)


# the store in a cache


def test_the_store_moves_and_crops_codes_and_keeps_centroids():
    _, k = states()
    store = ProductCodes(2, 3)
    store.map(lambda part: part[:1])  # nothing there yet
    store.crop(0)
    store.fit(k, torch.arange(N) >= torch.tensor([[0], [6]]), 10)
    codes, centroids = store.codes.clone(), store.centroids.clone()
    store.map(lambda part: part[[1, 0, 1]])
    assert torch.equal(store.codes, codes[[1, 0, 1]])
    assert torch.equal(store.centroids, centroids[[1, 0, 1]])
    store.crop(30)
    assert torch.equal(store.codes, codes[[1, 0, 1], :, :30])
    store.append(k[[1, 0, 1], :, 30:])
    assert torch.equal(store.codes, codes[[1, 0, 1]])
    assert store.value is store


def sparse_logits(model, ids, mask=None, **settings):
    with attach(model, PQCacheSelector(2, 4, sink=1), SMALL) as run:
        logits = generate(model, ids, mask, **settings)[1]
    assert run.receipt.density < 0.5
    return logits


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padding_does_not_change_the_selection(family):
    model = tiny_model(family)
    ids, mask = left_padded((40, 33, 17))
    together = sparse_logits(model, ids, mask)
    for row, length in enumerate((40, 33, 17)):
        alone = sparse_logits(model, ids[row : row + 1, 40 - length :])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"prefill_chunk_size": 8}, {"cache_implementation": "static"}]
)
def test_the_kind_of_cache_does_not_change_the_selection(settings):
    model = tiny_model("llama")
    ids, mask = left_padded()
    actual = sparse_logits(model, ids, mask, **settings)
    torch.testing.assert_close(actual, sparse_logits(model, ids, mask), rtol=0, atol=1e-5)


def test_one_selector_serves_many_caches_and_their_copies():
    model = tiny_model("llama")
    question = prompt(length=4, seed=5)
    with torch.no_grad(), attach(model, PQCacheSelector(2, 4), SMALL, sparse_rows=4):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for seed, cache in enumerate(caches):
            model(prompt(length=40, seed=seed), past_key_values=cache)
        duplicate = copy.deepcopy(caches[0])
        first = model(question, past_key_values=caches[0]).logits
        other = model(question, past_key_values=caches[1]).logits
        again = model(question, past_key_values=duplicate).logits
        copied = copy.deepcopy(caches[0])
        ahead = [model(question, past_key_values=c).logits for c in (caches[0], copied)]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(*ahead)


# costs and refusals


@pytest.mark.parametrize(
    ("parts", "bits", "total"), [(2, 6, 12), (4, 8, 32), (16, 8, 128), (32, 8, 256)]
)
def test_bits_are_those_of_the_codes(parts, bits, total):
    selector = PQCacheSelector(parts, bits)
    assert selector.nominal_bits(4, 128) == selector.read_bits(4, 128) == total


def test_eight_bits_are_what_is_stored():
    _, k = states()
    store = ProductCodes(4, 8)
    store.fit(k, torch.ones(B, N, dtype=torch.bool), 1)
    bits = store.codes.numel() * store.codes.element_size() * 8 / (B * KV_HEADS * N)
    assert PQCacheSelector(4, 8).auxiliary_bits(GROUP, D) == bits


def test_record():
    selector = make_selector("pqcache", parts=4)
    assert selector.record() == {
        "name": "pqcache",
        "parameters": {"parts": 4, "bits": 6, "iterations": 10, "sink": 4, "layout": "per_kv_head"},
        "weights_sha256": None,
    }
    assert selector.needs == "nothing" and not selector.evicts


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"parts": 0}, "parts = 0: must be at least 1"),
        ({"iterations": -1}, "iterations = -1: must be at least 0"),
        ({"bits": 0}, r"bits = 0: must be within 1\.\.8"),
        ({"bits": 9}, r"bits = 9: must be within 1\.\.8"),
        ({"sink": -1}, "sink = -1: must be at least 0"),
        ({"layout": "heads"}, "layout = 'heads': must be one of"),
    ],
)
def test_bad_parameters_are_refused(parameters, said):
    with pytest.raises(ValueError, match=said):
        make_selector("pqcache", **parameters)


def test_parts_must_divide_the_head_dimension():
    q, k = states()
    selector = PQCacheSelector(3, 4)
    with pytest.raises(ValueError, match="parts = 3 must divide the head_dim 8"):
        selector.scores(0, q, stored(selector, k), SCALING)

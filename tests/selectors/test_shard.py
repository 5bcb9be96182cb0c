"""Every method on a part of the heads chooses what it chooses for these heads among all."""

import pytest
import torch

from hashattn import Budget
from hashattn.attention.masks import make_plan
from hashattn.base.errors import UnsupportedModelError
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.models.heads import HeadSlice
from hashattn.selectors import METHODS, make_selector
from hashattn.selectors.base import KeyView

LAYER, HEADS, KV_HEADS, N, D = 1, 8, 4, 90, 16
RANKS = 2
PROMPT = N - 1
SCALING = D**-0.5
BUDGET = Budget(sink=2, local=4, heavy=12)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hash_weights(layout, bits=32, depth=2, folds=0):
    config = HashConfig((LAYER,), HEADS, KV_HEADS, D, layout, bits, depth, 16, folds=folds)
    return HashWeights.random(config, seed=3)


def grids(heads, channels):
    low, step = -drawn(heads, channels, seed=5).abs() - 1, drawn(heads, channels, seed=6).abs() / 9
    return {LAYER: torch.stack([low, step + 0.05], 1)}


CHANNELS = {LAYER: drawn(HEADS, D).argsort(dim=-1)[:, :4]}
CENTERS = {LAYER: drawn(KV_HEADS, D) * 0.3}
CASES = {
    "dense": [],
    "hash": [
        {"weights": hash_weights("per_kv_head")},
        {"weights": hash_weights("per_kv_head"), "layout": "per_kv_head"},
        {"weights": hash_weights("per_query_head"), "scoring": "hamming"},
        {"weights": hash_weights("per_query_head"), "scoring": "asymmetric"},
    ],
    "transform": [{"weights": hash_weights("per_kv_head", depth=1, folds=3)}],
    "rabitq": [
        {"weights": hash_weights("per_kv_head", 64, depth=1, folds=1), "factor": factor}
        for factor in (False, True)
    ],
    "quest": [{}, {"page": 4, "bits": 4, "grids": grids(KV_HEADS, D)}],
    "lsh": [{}, {"layout": "per_query_head", "query_heads": HEADS}, {"centers": CENTERS}],
    "double_sparsity": [
        {"channels": CHANNELS},
        {"channels": CHANNELS, "grids": grids(HEADS, 4)},
        {
            "channels": {LAYER: CHANNELS[LAYER][:KV_HEADS]},
            "channel_layout": "per_kv_head",
            "layout": "per_kv_head",
        },
    ],
    "hata": [{"weights": {LAYER: drawn(KV_HEADS, D, 32)}, "key_norm": norm} for norm in (0, 1)],
    "loki": [
        {"basis": {LAYER: drawn(KV_HEADS, D, 4)}},
        {"basis": {LAYER: drawn(KV_HEADS, D, 4)}, "bits": 4, "grids": grids(KV_HEADS, 4)},
    ],
    "sparq": [{"channels": 4}],
    "magicpig": [
        {"bits": 2, "tables": 6},
        {"bits": 2, "tables": 6, "centers": CENTERS},
    ],
    "pqcache": [{"parts": 2, "bits": 3}],
    "socket": [{"value_norms": True}],
    "rerank": [
        {"base": make_selector("lsh")},
        {"base": make_selector("lsh"), "value_norms": True},
    ],
    "certified": [{"base": make_selector("lsh")}],
    "residual": [
        {"base": make_selector("double_sparsity", channels=CHANNELS)},
        {"base": make_selector("oracle"), "epsilon": 0.3, "delta": 0.3},
    ],
}
ALL = [(name, fields) for name in METHODS for fields in CASES.get(name, [{}])]
PARTS = [HeadSlice(HEADS, KV_HEADS, rank, RANKS) for rank in range(RANKS)]


def chosen(selector, queries, keys, values):
    """{token: log weight} of every list, of a decode step after a prompt in two chunks."""
    state = {}
    if selector.observes:
        for first, last in ((0, 40), (40, PROMPT)):
            view = KeyView(keys[:, :, :last], state)
            state = selector.observe(LAYER, queries[:, :, first:last], view, SCALING)
    encoded = selector.encode_keys(LAYER, keys) | selector.encode_values(LAYER, values)
    stores = {name: selector.new_store(name, part) for name, part in encoded.items()}
    for name, part in encoded.items():
        stores[name].append(part)
    index = {name: store.value for name, store in stores.items()} | state
    plan = make_plan(None, 1, 1, N, keys.device, BUDGET)
    view = KeyView(keys, index)
    indices, weights = selector.sample(LAYER, queries[:, :, PROMPT:], view, SCALING, plan)
    weights = torch.zeros(indices.shape) if weights is None else weights
    return [
        {int(t): float(w) for t, w in zip(*row, strict=True) if t >= 0}
        for row in zip(indices[0, :, 0], weights[0, :, 0], strict=True)
    ]


def inputs():
    return (
        drawn(1, HEADS, N, D, seed=1),
        drawn(1, KV_HEADS, N, D, seed=2),
        drawn(1, KV_HEADS, N, D, seed=3),
    )


@pytest.mark.parametrize(("name", "fields"), [c for c in ALL if c[0] not in ("dense", "infllm")])
def test_the_parts_together_choose_what_the_whole_chooses(name, fields):
    selector = make_selector(name, **fields)
    whole = chosen(selector, *inputs())
    split = []
    for part in PARTS:
        queries, keys, values = (part.of(x[0])[None] for x in inputs())
        split += chosen(selector.shard(part), queries, keys, values)
    assert len(split) == len(whole)
    assert [sorted(row) for row in split] == [sorted(row) for row in whole]
    for found, expected in zip(split, whole, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_part_is_made_once_so_that_a_cache_keeps_its_index():
    selector = make_selector("hash", weights=hash_weights("per_kv_head"))
    whole = selector.identity
    first, second = (selector.shard(part) for part in PARTS)
    assert selector.shard(PARTS[0]) is first
    assert len({whole, first.identity, second.identity}) == 3


def test_one_selection_for_all_heads_is_refused():
    for selector in (
        make_selector("infllm"),
        make_selector("rerank", base=make_selector("infllm")),
    ):
        with pytest.raises(UnsupportedModelError, match="device_map"):
            selector.shard(PARTS[0])


@pytest.mark.parametrize("name", ["hash", "hata", "loki", "double_sparsity", "lsh", "magicpig"])
def test_state_of_another_model_is_refused(name):
    fields = CASES[name][-1]
    with pytest.raises(ValueError, match="made for . heads, the model has 12 query heads"):
        make_selector(name, **fields).shard(HeadSlice(12, 6, 0, 2))


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_hash_weights_of_a_part(layout):
    weights = hash_weights(layout)
    parts = [weights.shard(part) for part in PARTS]
    for name, tensor in weights.tensors().items():
        assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), tensor)
    config = parts[1].config
    assert (config.query_heads, config.kv_heads, config.layout) == (4, 2, layout)


def test_shares_of_a_part():
    budget = Budget(sink=2, local=4, heavy=12, shares=((0.5, 1.5, 1.0, 1.0), (1.0,)))
    plan = make_plan(None, 1, 1, N, torch.device("cpu"), budget)
    whole = budget.of_layer(plan, 0, KV_HEADS, HEADS).heavy
    parts = [budget.of_layer(plan, 0, 2, 4, part).heavy for part in PARTS]
    assert torch.equal(torch.cat(parts, dim=1), whole) and whole.unique().tolist() == [6, 12, 18]
    assert budget.of_layer(plan, 1, 2, 4, PARTS[1]).heavy.unique().tolist() == [12]


def test_heads_that_cannot_be_shared():
    with pytest.raises(UnsupportedModelError, match="4 KV heads .* by 3 processes: start 1 or 2"):
        HeadSlice(HEADS, KV_HEADS, 0, 3)
    with pytest.raises(ValueError, match="rank = 2"):
        HeadSlice(HEADS, KV_HEADS, 2, 2)

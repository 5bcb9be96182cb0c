"""The timed steps compute what they claim; rows say under which protocol, of how many bytes."""

from dataclasses import replace

import pytest
import torch

from hashattn.attention.budget import Budget
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.bench import layer, timing
from hashattn.reproduce.bench.end_to_end import random_llama
from hashattn.reproduce.bench.layer import PEERS, bytes_read, check, encode_latency, layer_latency
from hashattn.reproduce.bench.step import TORCH_DENSE, DecodeStep
from hashattn.reproduce.bench.ways import DEFAULT, WAYS, Shape
from hashattn.selectors.hash import HashSelector

SMALL = Shape(query_heads=4, kv_heads=2, head_dim=64)
STAGES = ("encode", "select", "attend")
RANKED = [name for name, way in WAYS.items() if not way.sampled]


def step(budget, dtype=torch.float32, n=96, shape=SMALL):
    return DecodeStep(n, dtype, budget, shape)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(timing, "FLUSH_BYTES", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*TORCH_DENSE, "dense"])
def test_dense_variants_are_dense_attention(name, dtype):
    cache = step(Budget(heavy=1), dtype)
    query = cache.queries[1]
    keys, values = (x.double().repeat_interleave(2, 1) for x in (cache.keys, cache.values))
    weights = (query.double() @ keys.mT * 64**-0.5).softmax(-1)
    call = TORCH_DENSE.get(name, DecodeStep.dense)
    error = (call(cache, query).double() - weights @ values).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", WAYS)
def test_a_sparse_step_with_a_full_budget_is_dense(name):
    cache, clock = step(Budget(density=1.0)), timing.CLOCKS["wall"]
    for run in (cache.fused, cache.staged):
        out, stages, _ = run(name, cache.queries[0], clock)
        assert (out - cache.sdpa_grouped(cache.queries[0])).abs().max() < 1e-5
        assert all(seconds > 0 for seconds in stages.values())
    assert set(stages) == set(STAGES) and cache.codes[name].length == 95
    out, _, _ = cache.fused(name, cache.queries[0], clock, "numpy")
    assert (out - cache.sdpa_grouped(cache.queries[0])).abs().max() < 1e-5


def test_the_union_contains_every_list_of_its_group():
    cache = step(Budget(2, 4, heavy=6))
    query = cache.queries[0]
    out, stages = cache.union(DEFAULT, query, timing.CLOCKS["wall"])
    assert out.shape == query.shape and set(stages) == {*STAGES, "total"}
    full, _ = step(Budget(density=1.0)).union(DEFAULT, query, timing.CLOCKS["wall"])
    assert (full - cache.sdpa_grouped(query)).abs().max() < 1e-5


def test_a_sparse_step_reads_its_budget():
    cache = step(Budget(4, 8, density=0.25))
    for name in RANKED:
        _, _, (indices, log_weights) = cache.fused(name, cache.queries[0], timing.CLOCKS["wall"])
        assert indices.shape == (1, WAYS[name].lists(SMALL), 1, 24) and (indices >= 0).all()
        assert log_weights is None
    cache = step(Budget(4, 8, density=0.25), n=2000)
    _, _, (indices, log_weights) = cache.fused(
        "default_drawn", cache.queries[0], timing.CLOCKS["wall"]
    )
    assert 0.4 * 500 < (indices >= 0).sum() / 4 < 1.6 * 500 and (log_weights > 0).any()


def test_rows_hold_every_stage_and_the_protocol():
    rows = layer_latency(96, shape=SMALL, budget=Budget(density=0.5), repeats=3, clock="cpu")
    assert [(row["variant"], row["stage"]) for row in rows] == [
        *((name, "total") for name in (*WAYS, *TORCH_DENSE, "dense")),
        *((name, stage) for name in WAYS for stage in ("staged", *STAGES)),
    ]
    for row in rows:
        assert 0 <= row["q1"] <= row["ms"] <= row["q3"]
        assert (row["n"], row["sink"], row["density"]) == (96, 4, 0.5)
        assert (row["dtype"], row["repeats"], row["clock"]) == ("float32", 3, "cpu")
        assert row["threads"] == torch.get_num_threads() and row["bytes"] > 0
        if row["variant"] in RANKED:
            assert row["tokens_read"] == 48


def test_all_peers_run():
    rows = layer_latency(96, shape=SMALL, budget=Budget(2, 4, heavy=9), repeats=1, peers=PEERS)
    names = {row["variant"] for row in rows}
    peers = {"read", "gather", "default_numpy", "default_union", "topk", "threshold", "faiss"}
    assert peers <= names
    with pytest.raises(ValueError, match=r"peers = \['sun'\]"):
        layer_latency(96, shape=SMALL, peers=("sun",))


def test_bytes_are_what_a_step_must_read():
    cache = step(Budget(2, 4, heavy=10), torch.bfloat16)
    sizes = bytes_read(cache, check(cache))
    row = 2 * 64 * 2  # K and V of 64 bfloat16
    assert sizes["dense", "total"] == sizes["sdpa_gqa", "total"] == 2 * 96 * row
    assert sizes["default", "select"] == sizes["paper", "select"] == 2 * 96 * 4
    assert sizes["default_64", "select"] == 2 * 96 * 8
    assert sizes["default", "attend"] == 4 * 16 * row
    assert sizes["paper_kv_lists", "attend"] == sizes["gather", "total"] == 2 * 16 * row
    assert sizes["default", "encode"] == 6 * 64 * 32 * 2  # 4 query and 2 key maps
    assert sizes["paper", "encode"] == 6 * (64 * 128 + 128 * 32) * 2
    parts = [sizes["default", stage] for stage in STAGES]
    assert sizes["default", "total"] == sizes["default", "staged"] == sum(parts)


def test_times_come_from_the_clock(monkeypatch):
    ticks = iter(range(10000))
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda: float(next(ticks)))
    rows = layer_latency(96, shape=SMALL, repeats=2, clock="cpu")
    times = {(row["variant"], row["stage"]): row["ms"] for row in rows}
    assert times["sdpa_grouped", "total"] == 1000 and times["default", "encode"] == 1000
    assert times["default", "staged"] == 3000 and times["default", "total"] == 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [({"repeats": 0}, "repeats = 0"), ({"clock": "sun"}, "clock = 'sun'")],
)
def test_wrong_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        layer_latency(96, shape=SMALL, **change)
    with pytest.raises(ValueError, match="query_heads = 5"):
        Shape(query_heads=5, kv_heads=2)


def test_a_wrong_variant_stops_the_measurement(monkeypatch):
    monkeypatch.setitem(layer.TORCH_DENSE, "matmul", lambda cache, query: query)
    with pytest.raises(RuntimeError, match="matmul disagrees"):
        layer_latency(96, shape=SMALL, repeats=1)
    monkeypatch.undo()
    cache = step(Budget(heavy=3))
    assert set(check(cache)) == set(WAYS)
    staged = DecodeStep.staged
    monkeypatch.setattr(
        DecodeStep,
        "staged",
        lambda self, name, *rest: (
            staged(self, name, *rest)[0] + 1,
            *staged(self, name, *rest)[1:],
        ),
    )
    with pytest.raises(RuntimeError, match="default: one call and its stages disagree"):
        check(cache)


def test_encoding_is_timed_beside_its_weights():
    paper, shape = WAYS["paper"], Shape(4, 2, 32)
    maps = {"three, float32": (replace(paper, depth=3, hidden=64), "float32"),
            "two, bfloat16": (replace(paper, hidden=32), "bfloat16")}  # fmt: skip
    large, small = encode_latency(maps, repeats=2, shape=shape)
    assert large["variant"] == "three, float32" and large["ms"] > 0
    assert large["bytes"] == 6 * (32 * 64 + 64 * 64 + 64 * 32) * 4
    assert small["bytes"] == 6 * (32 * 32 + 32 * 32) * 2


def test_the_default_is_what_the_selector_does():
    model = random_llama(dict(
        vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    ))  # fmt: skip
    way = WAYS[DEFAULT]
    selector = HashSelector(HashWeights.for_model(model, **TrainRecipe.default().shape))
    assert (selector.scoring, selector.layout) == (way.scoring, way.layout)
    config = selector.weights.config
    assert {name: getattr(config, name) for name in way.codes} == way.codes
    assert way.grades._asdict() == config.grades

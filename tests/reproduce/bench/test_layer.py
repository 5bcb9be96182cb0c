"""The timed steps compute what they claim; rows say under which protocol, of how many bytes."""

import pytest
import torch

from hashattn.attention.budget import Budget
from hashattn.reproduce.bench import layer, timing
from hashattn.reproduce.bench.layer import PEERS, bytes_read, check, encode_latency, layer_latency
from hashattn.reproduce.bench.step import TORCH_DENSE, DecodeStep, Shape

SMALL = Shape(query_heads=4, kv_heads=2, head_dim=64, hidden=32)
LAYOUTS = ("per_kv_head", "per_query_head")


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


@pytest.mark.parametrize("backend", [None, "numpy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sparse_step_with_a_full_budget_is_dense(layout, backend):
    cache = step(Budget(density=1.0))
    out, stages = cache.sparse(layout, cache.queries[0], timing.CLOCKS["wall"], backend)
    assert (out - cache.sdpa_grouped(cache.queries[0])).abs().max() < 1e-5
    assert stages["total"] == pytest.approx(sum(stages[s] for s in ("encode", "select", "attend")))


def test_the_union_contains_every_list_of_its_group():
    cache = step(Budget(2, 4, heavy=6))
    query = cache.queries[0]
    out, stages = cache.union(query, timing.CLOCKS["wall"])
    assert out.shape == query.shape and set(stages) == {"encode", "select", "attend", "total"}
    full, _ = step(Budget(density=1.0)).union(query, timing.CLOCKS["wall"])
    assert (full - cache.sdpa_grouped(query)).abs().max() < 1e-5


def test_the_sparse_step_reads_its_budget():
    cache = step(Budget(4, 8, density=0.25))
    for layout, lists in zip(LAYOUTS, (2, 4), strict=True):
        indices = cache.select(layout, cache.encode(layout, cache.queries[0]))
        assert indices.shape == (1, lists, 1, 24) and (indices >= 0).all()


def test_rows_hold_every_stage_and_the_protocol():
    rows = layer_latency(96, shape=SMALL, budget=Budget(density=0.5), repeats=3, clock="cpu")
    stages = ("total", "encode", "select", "attend")
    assert [(row["variant"], row["stage"]) for row in rows] == [
        *((name, "total") for name in (*TORCH_DENSE, "dense")),
        *(("hash", stage) for stage in stages),
        *(("hash_query_lists", stage) for stage in stages),
    ]
    for row in rows:
        assert 0 <= row["q1"] <= row["ms"] <= row["q3"]
        assert (row["n"], row["tokens_read"], row["density"]) == (96, 48, 0.5)
        assert (row["dtype"], row["repeats"], row["clock"]) == ("float32", 3, "cpu")
        assert row["threads"] == torch.get_num_threads() and row["bytes"] > 0


def test_all_peers_run():
    rows = layer_latency(96, shape=SMALL, budget=Budget(2, 4, heavy=9), repeats=1, peers=PEERS)
    names = {row["variant"] for row in rows}
    assert {"read", "gather", "hash_numpy", "hash_union", "topk", "threshold", "faiss"} <= names
    with pytest.raises(ValueError, match=r"peers = \['sun'\]"):
        layer_latency(96, shape=SMALL, peers=("sun",))


def test_bytes_are_what_a_step_must_read():
    cache = step(Budget(2, 4, heavy=10), torch.bfloat16)
    lists = {name: cache.select(layout, cache.encode(layout, cache.queries[0]))
             for name, layout in layer.LISTS.items()}  # fmt: skip
    sizes = bytes_read(cache, lists)
    row = 2 * 64 * 2  # K and V of 64 bfloat16
    assert sizes["dense", "total"] == sizes["sdpa_gqa", "total"] == 2 * 96 * row
    assert sizes["hash", "select"] == 2 * 96 * 4 and sizes["hash", "attend"] == 2 * 16 * row
    assert sizes["hash_query_lists", "select"] == 4 * 96 * 4
    assert sizes["hash", "encode"] == 6 * (64 * 32 + 32 * 32) * 2  # 4 query and 2 key maps
    parts = [sizes["hash", stage] for stage in ("encode", "select", "attend")]
    assert sizes["hash", "total"] == sum(parts)


def test_times_come_from_the_clock(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setitem(timing.CLOCKS, "cpu", lambda: float(next(ticks)))
    rows = layer_latency(96, shape=SMALL, repeats=2, clock="cpu")
    times = {(row["variant"], row["stage"]): row["ms"] for row in rows}
    assert times["sdpa_grouped", "total"] == 1000 and times["hash", "encode"] == 1000
    assert times["hash", "total"] == 3000


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
    check(step(Budget(heavy=3)))


def test_encoding_is_timed_beside_its_weights():
    shapes = {"three, float32": (Shape(4, 2, 32, depth=3, hidden=64), "float32"),
              "two, bfloat16": (SMALL, "bfloat16")}  # fmt: skip
    large, small = encode_latency(shapes, repeats=2)
    assert large["variant"] == "three, float32" and large["ms"] > 0
    assert large["bytes"] == 6 * (32 * 64 + 64 * 64 + 64 * 32) * 4
    assert small["bytes"] == 6 * (64 * 32 + 32 * 32) * 2

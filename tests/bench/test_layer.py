"""The timed steps compute what they claim; the rows say under which protocol."""

import pytest
import torch
from hashattn.evaluation.latency import (
    BASELINES,
    DecodeStep,
    Shape,
    decode_latency,
    speedup_table,
)

from hashattn.attention.budget import Budget
from hashattn.evaluation import latency

SMALL = Shape(query_heads=4, kv_heads=2, head_dim=32)


def step(budget, dtype=torch.float32, layout="per_kv_head", n=96):
    return DecodeStep(n, dtype, budget, layout, 32, SMALL, seed=0)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(latency, "FLUSH_BYTES", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_dense_attention(name, dtype):
    cache = step(Budget(heavy=1), dtype)
    query = cache.queries[1]
    keys, values = (x.double().repeat_interleave(2, 1) for x in (cache.keys, cache.values))
    weights = (query.double() @ keys.mT * 32**-0.5).softmax(-1)
    error = (BASELINES[name](cache, query).double() - weights @ values).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("layout", ["per_kv_head", "per_query_head"])
def test_the_sparse_step_with_a_full_budget_is_dense(layout):
    cache = step(Budget(density=1.0), layout=layout)
    out, stages = cache.sparse(cache.queries[0])
    assert (out - cache.sdpa_grouped(cache.queries[0])).abs().max() < 1e-5
    assert stages["total"] == pytest.approx(sum(stages[s] for s in ("encode", "select", "attend")))


def test_the_sparse_step_reads_its_budget():
    cache = step(Budget(4, 8, density=0.25))
    indices = cache.select(cache.selector.encode_queries(0, cache.queries[0]))
    assert indices.shape == (1, 2, 1, 24) and (indices >= 0).all()


def test_rows_hold_every_stage_and_the_protocol(monkeypatch):
    rows = decode_latency(96, shape=SMALL, budget=Budget(density=0.5), repeats=3, clock="cpu")
    assert [(row["variant"], row["stage"]) for row in rows] == [
        *((name, "total") for name in BASELINES),
        *(("hash", stage) for stage in ("encode", "select", "attend", "total")),
    ]
    for row in rows:
        assert 0 <= row["q1"] <= row["ms"] <= row["q3"]
        assert (row["n"], row["tokens_read"], row["density"]) == (96, 48, 0.5)
        assert (row["dtype"], row["repeats"], row["clock"]) == ("float32", 3, "cpu")


def test_times_come_from_the_clock(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setitem(latency.CLOCKS, "cpu", lambda: float(next(ticks)))
    rows = decode_latency(96, shape=SMALL, repeats=2, clock="cpu")
    times = {(row["variant"], row["stage"]): row["ms"] for row in rows}
    assert times["sdpa_grouped", "total"] == 1000 and times["hash", "encode"] == 1000
    assert times["hash", "total"] == 3000


def test_speedup_is_over_the_fastest_dense_call():
    def row(variant, ms, n, stage="total"):
        return {
            "variant": variant,
            "stage": stage,
            "ms": ms,
            "n": n,
            "dtype": "float32",
            "layout": "per_kv_head",
            "density": 0.1,
        }

    rows = [
        row("sdpa_gqa", 9.0, 8),
        row("matmul", 4.0, 8),
        row("hash", 2.0, 8),
        row("hash", 1.0, 8, "encode"),
        row("matmul", 6.0, 16),
        row("hash", 1.5, 16),
    ]
    table = speedup_table(rows).set_index("n")
    assert table["speedup"].tolist() == [2.0, 4.0]
    assert table["best_dense"].tolist() == ["matmul", "matmul"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"repeats": 0}, "repeats = 0"), ({"clock": "sun"}, "clock = 'sun'"),
     ({"layout": "rows"}, "layout")],
)  # fmt: skip
def test_wrong_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        decode_latency(96, shape=SMALL, **change)
    with pytest.raises(ValueError, match="query_heads = 5"):
        Shape(query_heads=5, kv_heads=2)


def test_disagreeing_baselines_stop_the_measurement(monkeypatch):
    monkeypatch.setitem(latency.BASELINES, "matmul", lambda cache, query: query)
    with pytest.raises(RuntimeError, match="matmul disagrees"):
        decode_latency(96, shape=SMALL, repeats=1)

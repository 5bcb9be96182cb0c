"""Tables: the fastest peer counts, losses stay visible, break-even is not a lucky length."""

import math

import pandas as pd
import pytest

from hashattn.reproduce.bench import tables


def row(variant, ms, n, stage="total", size=0, threads=1, dtype="float32"):
    return {"variant": variant, "stage": stage, "ms": ms, "n": n, "bytes": size,
            "threads": threads, "dtype": dtype}  # fmt: skip


def lengths(hash_ms, torch_ms=(4.0, 8.0, 16.0), dense_ms=(2.0, 4.0, 8.0), **more):
    rows = []
    for n, ours, theirs, dense in zip((1, 2, 4), hash_ms, torch_ms, dense_ms, strict=True):
        rows += [row("sdpa_gqa", 99.0, n, **more), row("matmul", theirs, n, **more),
                 row("dense", dense, n, **more), row("hash", ours, n, **more),
                 row("hash", ours / 4, n, "encode", **more)]  # fmt: skip
    return rows


def test_speed_up_is_over_the_fastest_torch_call_and_over_ours():
    table = tables.speedups(lengths((8.0, 4.0, 4.0))).droplevel(["threads", "dtype"])
    assert table["torch"].tolist() == ["matmul"] * 3
    assert table["hash / torch"].tolist() == [0.5, 2.0, 4.0]
    assert table["hash / dense"].tolist() == [0.25, 1.0, 2.0]
    assert "hash_query_lists ms" not in table


@pytest.mark.parametrize(
    ("hash_ms", "torch", "dense"),
    [
        ((8.0, 4.0, 4.0), 2, 2),
        ((1.0, 9.0, 4.0), 4, 4),  # winning at 1 was luck: it loses at 2
        ((1.0, 1.0, 1.0), 1, 1),
        ((9.0, 9.0, 9.0), 4, math.nan),
    ],
)
def test_break_even_is_where_losing_ends(hash_ms, torch, dense):
    line = tables.break_even(lengths(hash_ms), ["hash"]).iloc[0]
    assert line["torch"] == torch
    assert line["dense"] == dense or (math.isnan(dense) and math.isnan(line["dense"]))


def test_roofline_divides_by_what_reading_takes():
    rows = [row("read", 10.0, 8, size=1000), row("dense", 12.5, 8, size=1000),
            row("gather", 2.0, 8, size=100)]  # fmt: skip
    for name in tables.SPARSE:
        rows += [row(name, 1.0, 8, "select", 50), row(name, 3.0, 8, "attend", 150)]
    line = tables.roofline(rows).iloc[0]
    assert line["read GB/s"] == pytest.approx(100 / 1e6) and line["dense share"] == 0.8
    assert line["hash / floor"] == pytest.approx(4.0 / 2.0)  # 200 bytes at 100 a millisecond
    assert line["gather / floor"] == pytest.approx(2.0)


def test_stages_and_scaling():
    times = {"encode": 1.0, "select": 2.0, "attend": 6.0, "total": 9.0}
    rows = [row("hash", ms, 8, stage) for stage, ms in times.items()]
    assert tables.stages(rows)["encode share"].tolist() == [0.125]
    rows += [row("hash", 5.0, 8, threads=2)]
    assert tables.scaling(rows).loc[("float32", 8, 2), "hash"] == pytest.approx(1.8)


def test_selection_beside_its_peers():
    rows = [row("topk", 20.0, 8), row("threshold", 1.0, 8), row("faiss", 6.0, 8),
            row("select_shared_codes", 3.0, 8), row("hash", 9.0, 8),
            row("hash", 4.0, 8, "select")]  # fmt: skip
    line = tables.selection(rows).iloc[0]
    assert line["topk / threshold"] == 20 and line["topk / select"] == 5
    assert line["faiss / ours"] == 2


def test_whole_models_beside_their_ceiling():
    shared = {"model": "m", "threads": 1, "n": 8, "q1": 0, "q3": 0}
    rows = [
        shared | {"variant": "transformers", "ms": 40.0, "attention_share": 0.75, "ceiling": 4.0},
        shared | {"variant": "dense", "ms": 20.0, "attention_share": 0.5, "ceiling": 2.0},
        shared | {"variant": "hash", "ms": 12.5, "attention_share": 0.2, "ceiling": 1.25,
                  "encode_ms": 1.0, "select_ms": 2.0, "attend_ms": 8.0},
    ]  # fmt: skip
    table = tables.models(rows)
    assert table["speed-up"].tolist() == [0.5, 1.0, 1.6]
    assert tables.model_stages(rows)["encode share"].tolist() == [0.1]
    assert isinstance(table, pd.DataFrame)


def test_one_thread_alone_has_nothing_to_scale():
    rows = [
        {"threads": 1, "dtype": "float32", "n": n, "variant": "dense", "stage": "total", "ms": 1.0}
        for n in (1024, 2048)
    ]
    assert tables.scaling(rows).empty
    more = [row | {"threads": 2, "ms": 0.5} for row in rows]
    assert tables.scaling(rows + more).loc[("float32", 2048, 2), "dense"] == 2

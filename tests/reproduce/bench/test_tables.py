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
                 row("dense", dense, n, **more), row("default", ours, n, **more),
                 row("default", ours / 4, n, "encode", **more)]  # fmt: skip
    return rows


def test_speed_up_is_over_the_fastest_torch_call_and_over_ours():
    table = tables.speedups(lengths((8.0, 4.0, 4.0))).droplevel(["threads", "dtype"])
    assert table["torch"].tolist() == ["matmul"] * 3
    assert table["default / torch"].tolist() == [0.5, 2.0, 4.0]
    assert table["default / dense"].tolist() == [0.25, 1.0, 2.0]
    assert "paper ms" not in table


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
    line = tables.break_even(lengths(hash_ms), ["default"]).iloc[0]
    assert line["torch"] == torch
    assert line["dense"] == dense or (math.isnan(dense) and math.isnan(line["dense"]))


def test_roofline_divides_by_what_reading_takes():
    rows = [row("read", 10.0, 8, size=1000), row("dense", 12.5, 8, size=1000),
            row("gather", 2.0, 8, size=100)]  # fmt: skip
    for name in ("default", "paper"):
        rows += [row(name, 1.0, 8, "select", 50), row(name, 3.0, 8, "attend", 150)]
    line = tables.roofline(rows).iloc[0]
    assert line["read GB/s"] == pytest.approx(100 / 1e6) and line["dense share"] == 0.8
    assert line["default / floor"] == pytest.approx(4.0 / 2.0)  # 200 bytes at 100 a millisecond
    assert line["gather / floor"] == pytest.approx(2.0)


def test_stages_and_scaling():
    times = {"encode": 1.0, "select": 2.0, "attend": 6.0, "total": 9.0}
    rows = [row("default", ms, 8, stage) for stage, ms in times.items()]
    assert tables.stages(rows)["encode share"].tolist() == [0.125]
    rows += [row("default", 5.0, 8, threads=2)]
    assert tables.scaling(rows).loc[("float32", 8, 2), "default"] == pytest.approx(1.8)


def test_selection_beside_its_peers():
    rows = [row("topk", 20.0, 8), row("threshold", 1.0, 8), row("faiss", 6.0, 8),
            row("select_shared_codes", 3.0, 8), row("paper_kv_lists", 9.0, 8),
            row("paper_kv_lists", 4.0, 8, "select")]  # fmt: skip
    line = tables.selection(rows).iloc[0]
    assert line["topk / threshold"] == 20 and line["topk / select"] == 5
    assert line["faiss / ours"] == 2


def test_whole_models_beside_their_ceiling():
    shared = {"model": "m", "threads": 1, "n": 8, "q1": 0, "q3": 0, "layers": 4}
    none = {"kernel_ms": None, "host_ms": None, "attention_ms": 30.0}
    rows = [
        shared | none
        | {"variant": "transformers", "ms": 40.0, "attention_share": 0.75, "ceiling": 4.0},
        shared | {"variant": "dense", "ms": 20.0, "attention_share": 0.5, "ceiling": 2.0,
                  "attention_ms": 10.0, "kernel_ms": 9.0, "host_ms": 1.0},
        shared | {"variant": "default", "ms": 12.5, "attention_share": 0.2, "ceiling": 1.25,
                  "attention_ms": 2.5, "kernel_ms": 2.0, "host_ms": 0.5},
    ]  # fmt: skip
    table = tables.models(rows)
    assert table["speed-up"].tolist() == [0.5, 1.0, 1.6]
    assert isinstance(table, pd.DataFrame)
    host = tables.model_host(rows)
    assert host.index.get_level_values("variant").tolist() == ["dense", "default"]
    assert host["host us a layer"].tolist() == [250, 125]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((2.0, 1.0), (1.0, 2.0), 1.0),  # 2 + n < 1 + 2 n from 1 on
        ((0.5, 1.0), (1.0, 2.0), 0.0),
        ((2.0, 2.0), (1.0, 1.0), math.nan),
        ((0.5, 1.0), (1.0, 1.0), 0.0),
        ((0.5, 2.0), (1.0, 1.0), math.nan),  # below at first, not for good
    ],
)
def test_where_a_line_stays_below_another(ours, theirs, expected):
    assert tables.crossing(ours, theirs) == pytest.approx(expected, nan_ok=True)


def test_what_a_step_costs_at_any_length():
    lengths, rows = (1024, 2048, 4096), []
    for n in lengths:
        k = n / 1024
        rows += [
            row("matmul", 1 + 2 * k, n, size=4e6 * k),
            row("dense", 0.5 + k, n, size=4e6 * k),
            row("default", 1 + 0.5 * k, n, size=1e6 * k),
            row("read", 0.5 * k, n, size=4e6 * k),
        ]
    table = tables.fixed_costs(rows).loc[1, "float32"]
    assert table["a ms"].tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert table["b us/1K"].tolist() == pytest.approx([2000, 1000, 500])
    ours = table.loc["default"]
    assert (ours["n"], ours["ms"], ours["MB"]) == (1024, 1.5, 1.0)
    assert ours["roofline ms"] == pytest.approx(1 / 8)  # 8 MB a millisecond
    assert ours["above it ms"] == pytest.approx(1.5 - 1 / 8)
    assert ours["below torch from"] == pytest.approx(0)
    assert ours["below dense from"] == pytest.approx(1024)
    assert table.loc["dense", "below torch from"] == 0


def test_speed_stands_beside_quality():
    rows = []
    for n in (32768, 131072):
        for name, ms in (("matmul", 40.0), ("dense", 20.0), ("default", 4.0), ("paper", 5.0)):
            rows.append(row(name, ms * n / 32768, n, dtype="bfloat16"))
    errors = pd.DataFrame({("m", "1/8"): {"default": 0.1}})
    assert tables.equal_quality(rows, errors, lengths=(7,)) is errors
    table = tables.equal_quality(rows, errors)
    assert table.loc["default"].dropna().tolist() == [10, 5, 10, 5, 0.1]
    assert math.isnan(table.loc["paper", ("m", "1/8")]) and table.loc["paper"].iloc[0] == 8


def test_generate_on_a_gpu():
    shared = {"model": "m", "n": 8, "q1": 1.0, "q3": 1.0, "device_ms": 2.0}
    rows = [
        shared | {"cache": cache, "variant": name, "ms": ms, "host_ms": ms - 2}
        for cache, name, ms in (("dynamic", "transformers", 10.0), ("dynamic", "default", 5.0),
                                ("static", "transformers", 4.0), ("static", "default", 2.0))
    ]  # fmt: skip
    table = tables.generated(rows)
    assert table.loc["m", 8, "dynamic", "default"]["speed-up"] == 2
    assert table.loc["m", 8, "static", "default"]["host_ms"] == 0


def test_one_thread_alone_has_nothing_to_scale():
    rows = [
        {"threads": 1, "dtype": "float32", "n": n, "variant": "dense", "stage": "total", "ms": 1.0}
        for n in (1024, 2048)
    ]
    assert tables.scaling(rows).empty
    more = [row | {"threads": 2, "ms": 0.5} for row in rows]
    assert tables.scaling(rows + more).loc[("float32", 2048, 2), "dense"] == 2

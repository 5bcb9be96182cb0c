"""`make gpu` without a GPU: its cells run in the interpreter, its tables from made-up rows."""

import json
import time

import pytest
import torch

from hashattn.reproduce.bench import gpu, tables
from hashattn.reproduce.bench.__main__ import main
from hashattn.reproduce.bench.gpu import Cell, Grid, bench, generate_rows, measure_grid
from hashattn.reproduce.bench.ways import Shape
from on_device import CUDA, GPU

SMALL = {"GQA": Shape(4, 2, 64), "MHA": Shape(1, 1, 64)}


class HostClock:
    """Times each call once on the host, whether it is captured or not."""

    def __init__(self):
        self.times = {}

    def capture(self, call):
        return call

    def measure(self, calls, repeats, wait):
        return {name: self.time(call) for name, call in calls.items()}

    def time(self, call):
        if call not in self.times:
            start = time.perf_counter()
            call()
            ms = (time.perf_counter() - start) * 1e3
            self.times[call] = {"ms": ms, "q1": ms, "q3": ms}
        return self.times[call]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "SINK", 3)
    monkeypatch.setattr(gpu, "LOCAL", 5)


@pytest.mark.skipif(CUDA, reason="what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["gpu", "--output", str(tmp_path / "gpu.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_grid_has_every_variant_stage_and_density(monkeypatch):
    assert set(gpu.VARIANTS) == set(tables.GPU_SPARSE)
    some = ("default", "default_kv_lists", "default_64_drawn", "default_union", "paper_kv_lists")
    monkeypatch.setattr(gpu, "VARIANTS", {name: gpu.VARIANTS[name] for name in some})
    shapes = {"GQA": SMALL["GQA"]}
    grid = Grid(shapes, contexts=(100,), batches=(1,), divisors=(4, 10), repeats=1)
    rows, missing = measure_grid(grid, HostClock(), GPU)
    assert missing == [] and {row["heads"] for row in rows} == {"GQA"}
    dense = {row["variant"] for row in rows if row["divisor"] is None and row["graph"]}
    assert {"dense", "sdpa_grouped", "sdpa_gqa"} <= dense
    for name in some:
        of_it = {(r["stage"], r["divisor"], r["graph"]) for r in rows if r["variant"] == name}
        everywhere = name in ("default", "default_kv_lists", "paper_kv_lists")
        assert of_it == {
            ("total", d, g) for d in (4, 10)[: 1 + everywhere] for g in (True, False)
        } | {(stage, 4, True) for stage in ("encode", "select", "attend")}
    one = {(r["variant"], r["stage"]): r["bytes"] for r in rows
           if r["graph"] and r["divisor"] in (4, None)}  # fmt: skip
    assert one["dense", "total"] == 100 * 2 * 2 * 64 * 2
    assert one["default", "select"] == one["paper_kv_lists", "select"] == 2 * 100 * 4
    assert one["default_64_drawn", "select"] == 2 * 100 * 8
    assert one["default", "attend"] == 4 * (25 + 8) * 2 * 64 * 2
    assert one["paper_kv_lists", "attend"] == 2 * (25 + 8) * 2 * 64 * 2
    assert one["default", "total"] == sum(one["default", s] for s in ("encode", "select", "attend"))


@pytest.mark.parametrize("wrong", ["indices", "out"])
def test_wrong_kernels_are_not_measured(wrong):
    cell = Cell(SMALL["GQA"], 1, 80, GPU)
    for name in ("default", "default_drawn", "paper_kv_lists"):
        step = cell.sparse(name, 8)
        step(cell.q)
        cell.check(name, step)
        getattr(step, wrong).add_(1)
        with pytest.raises(RuntimeError, match="differ"):
            cell.check(name, step)


def test_generate_with_both_caches_and_what_fails_is_named(monkeypatch):
    shape = dict(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    patient = Grid(models=(300,), model_seconds=3600)
    rows, missing = generate_rows(patient, torch.device("cpu"), shape)
    assert missing == []
    assert {(row["variant"], row["cache"]) for row in rows} == {
        (name, cache)
        for name in ("transformers", "default", "default_kv_lists", "paper_kv_lists")
        for cache in ("dynamic", "static")
    }
    monkeypatch.setattr(gpu, "model_latency", lambda *a, **k: 1 / 0)
    rows, missing = generate_rows(patient, torch.device("cpu"), shape)
    assert rows == [] and missing[0].startswith("generate, transformers, dynamic cache, 300")
    assert all("ZeroDivisionError" in line for line in missing)
    late = Grid(models=(300,), model_seconds=-1)
    assert "out of time" in generate_rows(late, torch.device("cpu"), shape)[1][0]


def test_peers_that_fail_or_err_are_named_not_measured(monkeypatch):
    def dense(self):
        yield "dense", lambda: torch.zeros_like(self.q)
        yield "sdpa_gqa", lambda: torch.ones_like(self.q)
        yield "flex", lambda: 1 / 0

    monkeypatch.setattr(Cell, "_dense", dense)
    monkeypatch.setattr(gpu, "VARIANTS", {"default": gpu.VARIANTS["default"]})
    rows, missing = measure_grid(
        Grid({"MHA": SMALL["MHA"]}, (40,), (1,), (4,), 1), HostClock(), GPU
    )
    assert {row["variant"] for row in rows} & set(tables.GPU_DENSE) == {"dense"}
    assert [reason.split(": ")[1:3] for reason in missing] == [
        ["sdpa_gqa", "wrong output, not measured"], ["flex", "ZeroDivisionError"],
    ]  # fmt: skip


def test_cells_that_do_not_fit_or_come_too_late_are_named(monkeypatch):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 2**31)
    _, missing = measure_grid(Grid(contexts=(2**20,), batches=(1,)), HostClock(), GPU)
    assert missing[0] == "GQA, batch 1, 1048576 tokens: needs 5 GiB"
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 2**50)
    _, missing = measure_grid(Grid(batches=(1,), contexts=(8,), seconds=-1), HostClock(), GPU)
    assert missing == ["GQA, batch 1, 8 tokens: out of time", "MHA, batch 1, 8 tokens: out of time"]


def record() -> dict:
    """Copy at 2 TB/s; dense 1, 2, 4 ms; the default 2, 1, 1 ms."""
    rows = []
    for n, dense, hashed in ((8192, 1.0, 2.0), (16384, 2.0, 1.0), (32768, 4.0, 1.0)):
        cell = {"heads": "GQA", "batch": 1, "n": n, "graph": True, "stage": "total"}
        rows += [
            cell | {"variant": "flex", "divisor": None, "ms": 2 * dense, "bytes": 10**9},
            cell | {"variant": "dense", "divisor": None, "ms": dense, "bytes": 10**9},
            cell | {"variant": "default", "divisor": 32, "ms": hashed, "bytes": 10**8},
            cell | {"variant": "default", "divisor": 32, "stage": "attend", "ms": hashed / 2,
                    "bytes": 10**8},
            cell | {"variant": "topk", "divisor": 32, "ms": 3.0, "bytes": None},
        ]  # fmt: skip
        rows += [row | {"graph": False, "ms": 10.0} for row in rows if row["stage"] == "total"]
    return {
        "rows": rows,
        "copy_bytes_per_second": 2e12,
        "models": [],
        "not_measured": ["flashinfer: x"],
    }


def test_tables_and_report(capsys):
    table = tables.gpu_speedups(record())
    assert table["default / dense"].tolist() == [0.5, 2.0, 4.0]
    assert table["dense"].tolist() == ["dense"] * 3
    assert table["dense / copy"].tolist() == [0.5, 0.25, 0.125]
    assert tables.gpu_speedups(record(), graph=False)["default / dense"].tolist() == [1.0] * 3
    assert tables.gpu_break_even(record()).loc["GQA", 1, 32]["default"] == 16384
    stage = tables.gpu_stages(record()).loc["GQA", 1, 8192, "default", "attend"]
    assert stage.tolist() == pytest.approx([1000, 0.1, 0.05])
    gpu.report(record())
    assert "not measured: flashinfer" in capsys.readouterr().out


@pytest.mark.skipif(not CUDA, reason="needs a GPU: events and graphs")
def test_a_small_grid_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "check_kernels", lambda: {"self_test": [], "passed": True, "tests": []}
    )
    path = tmp_path / "gpu.json"
    bench(path, Grid(SMALL, contexts=(4096,), batches=(1,), repeats=2, models=()))
    stored = json.loads(path.read_text())
    assert stored["copy_bytes_per_second"] > 1e11 and stored["rows"]
    assert not [reason for reason in stored["not_measured"] if "CUDA graph" in reason]

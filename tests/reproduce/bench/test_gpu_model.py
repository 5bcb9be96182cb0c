"""The model of a GPU's step: its arithmetic by hand, and where its slots come from."""

import pytest

from hashattn.reproduce.bench.__main__ import main
from hashattn.reproduce.bench.gpu_model import CARDS, SLOTS, Card, known_slots, paragraph, predict
from hashattn.reproduce.bench.ways import WAYS, Shape

SIMPLE = Card(peak=1e12, cache=1e9, multiprocessors=1, clock=1e9 / 64)  # a slot a nanosecond


def test_a_step_by_hand():
    n, shape = 32768, Shape(4, 2, 64)
    got = predict(SIMPLE, WAYS["default"], n, 2.0, shape)
    row = 2 * 64 * 2
    assert got["dense MB"] == n * 2 * row / 1e6
    assert got["dense us"] == pytest.approx(n * 2 * row / 0.9e6 + 5)
    assert got["codes MB"] == n * 2 * 4 / 1e6
    assert got["rows MB"] == (1024 + 256) * 4 * row / 1e6
    assert got["select us"] == pytest.approx(n * 4 * 10 / 1e3)  # 2 and 8 slots a key and list
    assert got["gather us"] == pytest.approx(1280 * 4 * row / 0.75e6)
    assert got["us"] == pytest.approx(got["select us"] + got["gather us"] + 5 * 2.5)
    assert got["floor us"] == pytest.approx((n * 8 + 1280 * 4 * row) / 1e6)
    assert got["dense / sparse"] == pytest.approx(got["dense us"] / got["us"])
    assert predict(SIMPLE, WAYS["paper"], n, 2.0, shape)["launches"] == 4


def test_levels_that_no_cache_holds_are_streamed():
    fast = Card(peak=1e12, cache=1e3, multiprocessors=10**6)
    got = predict(fast, WAYS["default_kv_lists"], 4096, 0.0)
    assert got["select us"] == pytest.approx(4096 * 8 * (4 + 3) / 0.9e6)


def test_the_dense_bytes_of_the_facts():
    """Llama-3.1-8B's heads: 134, 537 and 4,295 MB at 32K, 128K and 1M tokens."""
    for n, megabytes in ((32768, 134), (131072, 537), (1048576, 4295)):
        got = predict(CARDS["H100"], WAYS["paper_kv_lists"], n, 50.0)
        assert got["dense MB"] == pytest.approx(megabytes, rel=0.01)


def build(name, slots, architecture="sm_90"):
    return {"name": name, "slots": slots, "architecture": architecture}


def test_slots_come_from_the_gate_where_it_has_them():
    assert known_slots({}) == SLOTS
    graded = "histogram_kernel GROUP=1 SLOTS=1 WORDS=1 DIGITS=2 QUERY_WORDS=6 PACK=4 TILES="
    plain = "histogram_kernel GROUP=1 SLOTS=1 WORDS=1 DIGITS=1 QUERY_WORDS=1 PACK=4 TILES=4"
    builds = [build(graded + "1", [21.0, 24.0]), build(graded + "4", [20.0, 25.0]),
              build(graded + "4", [90.0, 90.0], "sm_80"), build(plain, [12.5, 14.0]),
              {"name": graded, "architecture": "sm_90"}]  # fmt: skip
    assert known_slots({"builds": builds}) == SLOTS | {"paper": 12.5}  # no second digit's yet
    builds.append(build("refine_kernel SHIFT=0 PACK=4 TILES=4", [4.5, 6.0]))
    known = known_slots({"builds": builds})
    assert known == SLOTS | {"paper": 12.5, "default": 25.5, "default_kv_lists": 25.5}


def test_it_is_printed_as_a_model(capsys):
    assert main(["model"]) == 0
    said = capsys.readouterr().out
    assert paragraph() in said and "| dense |" in said and said.count("x)") == 24

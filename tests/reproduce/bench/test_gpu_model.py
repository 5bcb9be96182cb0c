"""The model of a GPU's step: its arithmetic by hand, and where its slots come from."""

import pytest

from hashattn.reproduce.bench.__main__ import main
from hashattn.reproduce.bench.gpu_model import CARDS, SLOTS, Card, known_slots, paragraph, predict
from hashattn.reproduce.bench.ways import WAYS, Shape

SIMPLE = Card(peak=1e12, cache=1e9, multiprocessors=1, clock=1e9 / 64)  # a slot a nanosecond


def test_a_step_by_hand():
    n, shape = 32768, Shape(4, 2, 64)
    got = predict(SIMPLE, WAYS["default"], n, 0.01, shape, launches=4)
    row = 2 * 64 * 2
    assert got["dense MB"] == n * 2 * row / 1e6
    assert got["dense us"] == pytest.approx(n * 2 * row / 0.9e6 + 5)
    assert got["codes MB"] == n * 2 * 4 / 1e6
    assert got["rows MB"] == (1024 + 256) * 4 * row / 1e6
    issuing = n * 4 * 0.01 / 1e3
    assert got["select us"] == pytest.approx(issuing) and issuing > n * 8 / 0.9e6
    assert got["gather us"] == pytest.approx(1280 * 4 * row / 0.75e6)
    assert got["us"] == pytest.approx(got["select us"] + got["gather us"] + 10)
    assert got["floor us"] == pytest.approx((n * 8 + 1280 * 4 * row) / 1e6)
    assert got["dense / sparse"] == pytest.approx(got["dense us"] / got["us"])


def test_codes_that_no_cache_holds_are_read_twice():
    small = Card(peak=1e12, cache=1e3, multiprocessors=1000)
    once, twice = (predict(card, WAYS["default"], 4096, 0.0) for card in (SIMPLE, small))
    assert twice["select us"] == pytest.approx(2 * once["select us"])


def test_the_dense_bytes_of_the_facts():
    """Llama-3.1-8B's heads: 134, 537 and 4,295 MB at 32K, 128K and 1M tokens."""
    for n, megabytes in ((32768, 134), (131072, 537), (1048576, 4295)):
        got = predict(CARDS["H100"], WAYS["paper_kv_lists"], n, 50.0)
        assert got["dense MB"] == pytest.approx(megabytes, rel=0.01)


def test_slots_come_from_the_gate_where_it_has_them():
    assert known_slots({}) == SLOTS
    known = known_slots({"slots_a_key": {"default": 41, "another": 3}})
    assert known == SLOTS | {"default": 41.0}


def test_it_is_printed_as_a_model(capsys):
    assert main(["model"]) == 0
    said = capsys.readouterr().out
    assert paragraph() in said and "| dense |" in said and said.count("x)") == 24

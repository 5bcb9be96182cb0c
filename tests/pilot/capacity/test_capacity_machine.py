"""The micro-benchmark at a tiny size: what it times, keeps and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from capacity_cases import SMALL, measurement
from torch.nn.functional import scaled_dot_product_attention

from hashattn.base.files import WriteError
from hashattn.base.repository import repository
from hashattn.pilot.capacity import machine
from hashattn.pilot.capacity.machine import Line, Measurement, MeasurementError, measure
from hashattn.pilot.capacity.shapes import model_shape, read_config


@pytest.fixture(scope="module")
def embedded():
    return model_shape(read_config(str(repository() / "data" / "embedded")))


@pytest.fixture(scope="module")
def tiny(embedded):
    sizes = {"flush_bytes": 1000, "matrix_bytes": 100_000}
    return measure(embedded, 1 / 8, 32, tokens=(64, 256), repeats=3, **sizes)


def test_every_part_is_timed_with_its_spread(tiny, embedded):
    parts = [(timing.part, timing.tokens) for timing in tiny.timings]
    assert parts == [("dense", 64), ("sparse", 64), ("dense", 256), ("sparse", 256), ("weights", 0)]
    assert all(0 < t.low <= t.seconds <= t.high for t in tiny.timings)
    assert sum(t.seconds for t in tiny.timings) < tiny.took
    assert tiny.device.endswith(f", {torch.get_num_threads()} threads")
    matrix = -(-100_000 // 512) * 512  # bytes: whole rows of 256 numbers of 2 bytes
    assert tiny.weights_bandwidth == pytest.approx(matrix / tiny.timings[-1].seconds)
    row = 2 * 2 * 64 * 2  # K and V of 2 heads of 64 numbers of 2 bytes
    assert tiny.dense_bandwidth == pytest.approx(row / tiny.dense.per_token)
    tiny.check(embedded, 1 / 8, 32, "per_query_head")


@pytest.mark.parametrize("lists, heads", [("per_query_head", 8), ("per_kv_head", 2)])
def test_the_steps_are_attention(embedded, lists, heads, monkeypatch):
    """Dense against torch; a sparse step with the whole cache as its budget against dense; and
    with less, as many tokens in as many lists as are asked for."""
    generator = torch.Generator().manual_seed(3)
    layer = machine._Layer(embedded, 200, 1.0, 64, lists, generator)
    query = layer.queries[1].float()
    assert not torch.equal(layer.keys, layer.values)
    # K and V of a token side by side
    assert layer.values.data_ptr() - layer.keys.data_ptr() == 64 * 2
    keys, values = layer.keys.float(), layer.values.float()
    expected = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    for step in (layer.dense, layer.sparse):
        torch.testing.assert_close(step(1).float(), expected, atol=2e-2, rtol=2e-2)
    read = []
    original = machine.attend
    monkeypatch.setattr(machine, "attend", lambda *a: read.append(a[3]) or original(*a))
    machine._Layer(embedded, 400, 1 / 8, 64, lists, generator).sparse(0)
    assert read[0].shape[:3] == (1, heads, 1) and bool((read[0] >= 0).all())
    assert read[0].shape[3] == 50


def test_parts_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    calls = []
    parts = {("dense", n): lambda number, n=n: calls.append((number, n)) for n in (1, 2)}
    timings = machine._timed(parts, 3, 4)
    assert calls == [(number, n) for number in (-1, 0, 1, 2) for n in (1, 2)]
    assert [timing.tokens for timing in timings] == [1, 2]
    now = [0.0]  # a clock on which the first round takes 100 s, each that follows 1
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def part(number):
        now[0] += 100 if number < 0 else 1

    (timing,) = machine._timed({("dense", 1): part}, 2, 4)
    assert (timing.low, timing.seconds, timing.high) == (1, 1, 1)


def test_a_line_through_medians():
    line = Line.through((1000, 2000, 4000), [1.5, 2.0, 3.0])
    assert (line.fixed, line.per_token) == (pytest.approx(1), pytest.approx(5e-4))
    assert line.seconds(6000) == pytest.approx(4)
    steep = Line.through((1000, 2000), [1.0, 3.0])  # would cross zero at 500 tokens
    assert (steep.fixed, steep.per_token) == (0, pytest.approx(7e-3 / 5))
    assert Line.through((1000, 2000), [2.0, 1.0]) == Line(0.0, 1.0 / 2000)  # noise


def test_a_measurement_is_kept_and_found(tiny, tmp_path):
    path = tiny.save(tmp_path / "new" / "machine.json")
    assert Measurement.load(path) == tiny
    with pytest.raises(WriteError):
        tiny.save("/proc/machine.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("dense"),
        lambda c: c.update(format=99),
        lambda c: c.update(dense={"fixed": -1.0, "per_token": 1.0}),
        lambda c: c.update(weights_bandwidth=0),
        lambda c: c.update(more=1),
        lambda c: c.update(timings=3),
    ],
)
def test_a_file_that_holds_no_measurement(tmp_path, change):
    content = json.loads(measurement().save(tmp_path / "m.json").read_text())
    change(content)
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match="holds no measurement.*measure again"):
        Measurement.load(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(MeasurementError, match="holds no measurement"):
        Measurement.load(tmp_path / "m.json")


def test_other_shapes_and_settings_are_refused():
    kept = measurement()
    kept.check(SMALL, 1 / 16, 64, "per_query_head")
    for model, settings in (
        (replace(SMALL, head_dim=128), (1 / 16, 64, "per_query_head")),
        (replace(SMALL, dtype="float32"), (1 / 16, 64, "per_query_head")),
        (SMALL, (1 / 8, 64, "per_query_head")),
        (SMALL, (1 / 16, 32, "per_query_head")),
        (SMALL, (1 / 16, 64, "per_kv_head")),
    ):
        with pytest.raises(MeasurementError, match="measure again"):
            kept.check(model, *settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": (64,)}, "tokens = "),
        ({"tokens": (64, 64)}, "tokens = "),
        ({"tokens": (0, 64)}, "tokens = "),
        ({"repeats": 0}, "repeats = 0"),
        ({"lists": "one"}, "lists = 'one'"),
    ],
)
def test_bad_settings_of_a_measurement(embedded, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(embedded, **settings)

"""Calibration, the artefact, the monitor: against what the steps said, and what they refuse."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from drift_runs import attached, random_reference, selector, traffic

from hashattn import Budget
from hashattn.base.errors import HashAttnError
from hashattn.trust.drift.calibration import DriftCalibrator
from hashattn.trust.drift.monitor import DriftMonitor, DriftSettings, Watch
from hashattn.trust.drift.reading import StepReader
from hashattn.trust.drift.reference import DriftError, DriftReference
from hashattn.trust.drift.statistics import STATISTICS, bit_rates, bits_of
from helpers import generate, prompt

SEQUENCES, TOKENS, WARMUP = 40, 10, 12


class Kept(StepReader):
    def __init__(self, run, every=1):
        super().__init__(run, 1.0, 0, 4, every)
        self.kept = []

    def _take(self, readings):
        self.kept.append(readings)


@pytest.fixture(scope="module")
def calibrated():
    """(reference, readings of its traffic)"""
    with attached() as run:
        kept = Kept(run)
        calibrator = DriftCalibrator(run, warmup=WARMUP, top=4, share=0.5)
        with run.listen(calibrator), run.listen(kept):
            traffic(run, SEQUENCES, TOKENS + 1)
        kept.flush()
        return calibrator.reference(), kept.kept


def test_scales_are_of_the_second_half_of_the_warm_up(calibrated):
    reference, kept = calibrated
    half = WARMUP // 2 * TOKENS
    for name in ("margin", "recall", "missed_mass"):
        for column, layer in enumerate(reference.layers):
            values = np.concatenate([part.values[name][layer] for part in kept])
            part = [x for x in values[half : 2 * half].tolist() if not math.isnan(x)]
            row = STATISTICS.index(name)
            mean = sum(part) / len(part)
            spread = math.sqrt(sum((x - mean) ** 2 for x in part) / len(part))
            assert reference.means[row, column] == pytest.approx(mean, rel=1e-6)
            assert reference.scales[row, column] == pytest.approx(spread, rel=1e-5)


def test_the_rest_is_counted(calibrated):
    reference, _ = calibrated
    assert reference.sequences == SEQUENCES - WARMUP
    assert (reference.observations[0] == (SEQUENCES - WARMUP) * TOKENS).all()
    assert (reference.observations > 0).all() and reference.usable.all()
    assert ((reference.exponents > 0) & (reference.exponents <= 1)).all()


def test_codes_of_whole_contexts_are_counted(calibrated):
    """Half the warm-up: all keys of 40 prompt tokens and those of the steps."""
    reference, kept = calibrated
    codes = np.concatenate([part.keys[0][1] for part in kept])
    rates = bits_of(codes).mean(0)
    assert abs(bit_rates(reference.tables["key_surprise"][0]) - rates).mean() < 0.1


def test_saved_and_loaded(calibrated, tmp_path):
    reference, _ = calibrated
    assert reference.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    again = DriftReference.load(tmp_path / "a" / "b")
    for name, value in vars(reference).items():
        other = getattr(again, name)
        if name == "tables":
            for statistic, by_layer in value.items():
                for layer, table in by_layer.items():
                    np.testing.assert_array_equal(other[statistic][layer], table)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value, name


def damage(folder, kind):
    record = folder / "drift_reference.json"
    arrays = folder / "drift_reference.safetensors"
    content = json.loads(record.read_text())
    if kind == "no record":
        record.unlink()
    elif kind == "no arrays":
        arrays.unlink()
    elif kind == "a list":
        record.write_text("[]")
    elif kind == "version":
        record.write_text(json.dumps(content | {"format": 0}))
    elif kind == "layers":
        record.write_text(json.dumps(content | {"layers": [0]}))
    elif kind == "share":
        record.write_text(json.dumps(content | {"share": "much"}))
    elif kind == "other arrays":
        record.write_text(json.dumps(content | {"sha256": "0"}))
    elif kind == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:100])


@pytest.mark.parametrize(
    ("kind", "says"),
    [("no record", "does not exist"), ("no arrays", "does not exist"), ("a list", "not a drift"),
     ("version", "another version"), ("layers", "not a drift"), ("share", "not a drift"),
     ("other arrays", "not of one reference"), ("truncated", "truncated")],
)  # fmt: skip
def test_damaged_files_are_refused(calibrated, tmp_path, kind, says):
    calibrated[0].save(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(DriftError, match=says):
        DriftReference.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"method": selector(scoring="hamming")}, "another method: parameters"),
     ({"budget": Budget(1, 3, heavy=7)}, "another budget: heavy 6 there, heavy 7 here"),
     ({"dense_layers": [0]}, "another budget: dense_layers"),
     ({"method": selector("oracle", layout="per_query_head"), "family": "qwen3"},
      "another model: config_sha256")],
)  # fmt: skip
def test_references_of_something_else_are_refused(calibrated, settings, says):
    with attached(**settings) as run, pytest.raises(DriftError, match=says) as caught:
        DriftMonitor(run, calibrated[0])
    assert isinstance(caught.value, HashAttnError) and "DriftCalibrator" in str(caught.value)


def test_several_rows_a_call_are_the_same_traffic(calibrated):
    with attached(sparse_rows=7) as run:
        DriftMonitor(run, calibrated[0])


def test_too_little_traffic_is_refused():
    with attached() as run:
        calibrator = DriftCalibrator(run, warmup=4)
        with pytest.raises(DriftError, match="0 sequences ran sparse"):
            calibrator.reference()
        with run.listen(calibrator):
            traffic(run, 5, 3)
        with pytest.raises(DriftError, match="5 sequences ran sparse"):
            calibrator.reference()


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"every": 0}, "every"), ({"seed": -1}, "seed"), ({"horizon": 0}, "horizon"),
     ({"false_alarms": 0}, "false_alarms"), ({"false_alarms": 1}, "false_alarms"),
     ({"warnings": 0.001}, "warnings"), ({"warnings": 2}, "warnings")],
)  # fmt: skip
def test_settings_are_checked(settings, field):
    with pytest.raises(ValueError, match=f"{field} ="):
        DriftSettings(**settings)


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 2}, {"warmup": 1}, {"top": 0}])
def test_calibration_settings_are_checked(settings):
    with attached() as run, pytest.raises(ValueError, match=f"{next(iter(settings))} ="):
        DriftCalibrator(run, **settings)


def test_the_weights_of_the_streams_share_the_false_alarms():
    reference = random_reference(layers=3)
    settings = DriftSettings()
    watch = Watch(reference, settings)
    weights = np.exp(watch._offset) * settings.horizon / settings.false_alarms
    assert weights.sum() == pytest.approx(1)
    assert weights[watch.streams[:, 1] == 3].sum() == pytest.approx(0.5)


def test_all_streams_together_alarm_as_rarely_as_stated():
    """60 runs of exchangeable values of 15 streams, whose values are alike: a union bound holds."""
    settings, alarms = DriftSettings(horizon=200, false_alarms=0.3, warnings=0.6), 0
    for seed in range(60):
        rng = np.random.default_rng(100 + seed)
        watch = Watch(random_reference(seed=seed), replace(settings, seed=seed))
        shape = 200, len(STATISTICS), 3
        values = 0.1 * rng.normal(size=shape) + rng.normal(size=(200, 1, 1))
        values /= math.sqrt(1.01)
        values[:, 1:] = np.where(rng.random((200, 1, 1)) < 0.3, values[:, 1:], np.nan)
        alarms += bool((watch.update(values, 0) >= 0).any())
    assert alarms / 60 <= 0.3 + 2 * math.sqrt(0.3 * 0.7 / 60)


def test_a_monitor_tells_of_a_shift_and_keeps_its_alarm(calibrated):
    reference, _ = calibrated
    with attached() as run:
        monitor = DriftMonitor(run, reference, DriftSettings(every=4))
        with run.listen(monitor):
            traffic(run, 8, TOKENS + 1, seed=5)
            before = monitor.report()
            traffic(run, 20, TOKENS + 1, seed=6, step=1000)  # one token over and over
            after = monitor.report()
    assert before.state == "ok" and before.steps == 8 * TOKENS
    assert after.state == "alarm" and after.overall.evidence >= before.overall.evidence
    cause = after.overall.cause
    assert cause.statistic in STATISTICS and 70 <= cause.since <= cause.step < after.steps
    json.dumps(after.to_dict(), allow_nan=False)
    assert "alarm" in after.summary() and cause.statistic in after.summary()
    with attached() as run, run.listen(monitor):
        traffic(run, 5, TOKENS + 1, seed=7)
    later = monitor.report()
    assert later.state == "alarm" and later.overall.cause == cause  # it stays
    monitor.reset()
    fresh = monitor.report()
    assert (fresh.state, fresh.steps, fresh.overall.calls) == ("ok", 0, {})


def test_the_report_says_what_the_steps_said(calibrated):
    reference, _ = calibrated
    with attached() as run:
        kept, monitor = Kept(run), DriftMonitor(run, reference, DriftSettings(every=3))
        with run.listen(monitor), run.listen(kept):
            generate(run.model, prompt(3, 30), max_new_tokens=9)
            generate(run.model, prompt(1, 30), max_new_tokens=3)
        report = monitor.report()
    kept.flush()
    assert report.steps == 3 * 8 + 2
    assert report.overall.calls == {"sparse": 52} and report.overall.dense == 0
    for number, layer in enumerate(report.layers):
        assert layer.calls == {"sparse": 26} and set(layer.statistics) == set(STATISTICS)
        for part in kept.kept:
            part.add_surprise(reference.tables)
        values = np.concatenate([part.values["key_surprise"][number] for part in kept.kept])
        shown = layer.statistics["key_surprise"]
        assert shown.seen == 26 and shown.recent == pytest.approx(values.mean())
        assert shown.usual == reference.means[0, number]
        codes = layer.bits["keys"]
        assert 0 < codes["entropy"] <= 32 and 0 < codes["moved"] < 1
        assert 0 < layer.statistics["recall"].seen < 26  # half of the steps


def test_dense_calls_are_counted_by_reason(calibrated):
    with attached() as run:
        monitor = DriftMonitor(run, calibrated[0])
        with run.listen(monitor):
            ids = prompt(1, 30)
            cache = run.model(ids[:, :20], use_cache=True).past_key_values
            run.model(ids[:, 20:26], past_key_values=cache, use_cache=True)
            generate(run.model, prompt(1, 30), max_new_tokens=3)
        report = monitor.report()
    assert report.layers[0].calls == {"several_rows": 6, "sparse": 2}
    assert report.overall.dense == pytest.approx(0.75)


def test_without_codes_their_statistics_are_absent(tmp_path):
    with attached(selector("oracle", layout="per_query_head")) as run:
        calibrator = DriftCalibrator(run, warmup=8, top=12, share=1.0)
        with run.listen(calibrator):
            traffic(run, 24, 9)
        reference = calibrator.reference()
        reference.save(tmp_path)
        monitor = DriftMonitor(run, DriftReference.load(tmp_path))
        with run.listen(monitor):
            traffic(run, 2, 9)
        report = monitor.report()
    for part in (report.overall, *report.layers):
        assert "margin" in part.statistics and part.bits == {}
        assert not {"key_surprise", "query_surprise"} & set(part.statistics)


def test_memory_does_not_grow(calibrated, monkeypatch):
    monkeypatch.setattr("hashattn.trust.drift.monitor._POINTS", 16)
    with attached() as run:
        monitor = DriftMonitor(run, calibrated[0], DriftSettings(every=2))
        size = monitor.nbytes
        with run.listen(monitor):
            traffic(run, 1, 30)
            few = len(monitor.curve[0])
            traffic(run, 1, 150, length=10)
        assert monitor.nbytes == size and len(monitor._pending) < 2
        steps, curves = monitor.curve
        assert 8 <= few <= 16 and 8 <= len(steps) <= 16 and set(curves) == {0, 1, None}
        assert (np.diff(steps) > 0).all() and monitor.report().steps == 29 + 149


def test_threads_share_a_monitor(calibrated):
    with attached() as run:
        monitor = DriftMonitor(run, calibrated[0], DriftSettings(every=3))

        def serve(seed):
            cache = run.model(prompt(1, 20, seed), use_cache=True).past_key_values
            for _ in range(11):
                run.model(prompt(1, 1, seed), past_key_values=cache, use_cache=True)
            monitor.flush()

        with run.listen(monitor), torch.no_grad():
            threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        report = monitor.report()
    assert report.steps == 44 and report.layers[0].calls == {"sparse": 44}


def test_a_swap_ends_what_was_calibrated_for_the_selector_before(calibrated):
    reference, _ = calibrated
    with attached() as run, run.listen(DriftMonitor(run, reference)):
        traffic(run, 1, tokens=4)
        run.swap(selector("oracle"))
        with pytest.raises(DriftError, match="swapped"):
            traffic(run, 1, tokens=4)


def test_a_batch_that_is_larger_than_the_warm_up_allows_is_refused():
    with attached() as run, run.listen(DriftCalibrator(run, warmup=6, top=4)) as calibrator:
        with pytest.raises(DriftError, match="a batch of 4 sequences: calibrate with at most 3"):
            generate(run.model, prompt(4, 20), max_new_tokens=4)
            calibrator.flush()

"""Streams of sequences, and the study of false alarms and delays."""

import numpy as np
import pytest
from drift_runs import attached, random_reference

from hashattn.trust.drift.calibration import DriftCalibrator
from hashattn.trust.drift.monitor import DriftSettings
from hashattn.trust.drift.statistics import STATISTICS
from hashattn.trust.drift.study import (
    drift_study,
    first_alarm,
    kind_sequences,
    read_sequences,
    run_rows,
    stream,
)
from helpers import characters, prompt

SHAPE = len(STATISTICS), 3


def pool(sequences, shift=0.0, rows=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, *SHAPE)) + shift for _ in range(sequences)]


def test_streams_keep_the_order_of_sequences():
    sequences = [np.full((4, 1), n) + np.arange(4)[:, None] / 10 for n in range(5)]
    values = stream(sequences, 10, np.random.default_rng(0))[:, 0]
    assert len(values) == 10
    for begin in (0, 4):
        part = values[begin : begin + 4]
        np.testing.assert_allclose(part - part[0], np.arange(4) / 10)
    assert (values[:4:4] % 1 == 0).all()
    side = stream(sequences, 24, np.random.default_rng(0), side_by_side=3)[:, 0]
    for chain in range(3):
        mine = side[chain::3]
        steps = np.round(np.diff(mine) * 10) == 1
        begins = ~steps  # another sequence, from its first token on
        np.testing.assert_allclose(mine[1:][begins] % 1, 0, atol=1e-9)
        assert steps.sum() >= 4


def test_the_first_alarm_is_of_the_shifted_statistic():
    reference, settings = random_reference(), DriftSettings(every=1)
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, *SHAPE))
    assert first_alarm(reference, settings, values) is None
    values[150:, 0, 1] += 2.5  # the keys of layer 1
    step, statistic, layer = first_alarm(reference, settings, values)
    assert 150 < step < 200 and (statistic, layer) == ("key_surprise", 1)
    values[:, 0, 1] = rng.normal(size=400)
    values[150:, 2, 2] += 3  # margins, of all layers, on half of the steps
    step, statistic, layer = first_alarm(reference, settings, values)
    assert 150 < step < 260 and (statistic, layer) == ("margin", None)


@pytest.mark.parametrize("side_by_side", [1, 4])
def test_the_study_counts_alarms_and_delays(side_by_side):
    table = drift_study(
        random_reference(values=2000), pool(30), {"far": pool(10, 2.5), "same": pool(10, seed=1)},
        steps=600, seeds=6, after=100, follow=150, side_by_side=side_by_side,
    )  # fmt: skip
    usual, far, same = table
    assert usual["stream"] == "usual" and usual["alarms"] == 0 and usual["delay"] is None
    assert far["streams"] == far["alarms"] == 6 and far["early"] == 0
    assert 2 <= far["delay"] <= far["slowest"] <= 40 and "key_surprise" in far["by"]
    assert same["alarms"] == 0 and same["delay"] == np.inf


def test_rows_of_a_sequence_are_read_through_attach():
    with attached(sparse_rows=6) as run:
        calibrator = DriftCalibrator(run, warmup=24, share=1.0)
        with run.listen(calibrator):
            for seed in range(48):
                run_rows(run, prompt(1, 30, seed)[0], 6)
        reference = calibrator.reference()
        values = read_sequences(run, reference, [prompt(1, 30, 99)[0], prompt(1, 33, 98)[0]], 6)
        assert [part.shape for part in values] == [(6, *SHAPE)] * 2
        assert all(np.isfinite(part).all() for part in values)
        with pytest.raises(ValueError, match="rows = 30"):
            run_rows(run, prompt(1, 30)[0], 30)


def test_sequences_of_texts_are_whole():
    tokenizer = characters()
    found = kind_sequences(tokenizer, "prose", 300, 3)
    assert [ids.shape for ids in found] == [(300,)] * 3
    assert len({tuple(ids.tolist()) for ids in found}) == 3
    other = kind_sequences(tokenizer, "prose", 300, 1, split="train")
    assert tuple(other[0].tolist()) not in {tuple(ids.tolist()) for ids in found}

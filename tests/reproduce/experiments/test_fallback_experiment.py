"""The fallback's experiment in small, and its figure."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from hashattn import HashSelector
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import fallback, own_run
from hashattn.reproduce.experiments.common import shipped_or_trained
from hashattn.reproduce.experiments.fallback import FALLBACK, FIXED, TRUTH, FallbackScale
from hashattn.reproduce.profiles import load_profile

SMALL = FallbackScale(length=512, fitting=3, calibration=5, tested=3, rows=6, density=1 / 8,
                      tolerances=(0.2, 0.4), risk=0.3, levels=3)  # fmt: skip


def test_policies_side_by_side():
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    selector = HashSelector(shipped_or_trained(profile, model, tokenizer), layout="per_kv_head")
    rules, frame = fallback.fallbacks(profile, model, tokenizer, selector, SMALL)
    assert sorted(rules) == [0.2, 0.4]
    assert frame.policy.tolist() == [FALLBACK, TRUTH, FIXED] * 2
    heads = model.config.num_attention_heads * model.config.num_hidden_layers
    assert (frame.head_steps == 3 * 6 * heads).all()
    by = frame.set_index(["tolerance", "policy"])
    for tolerance in (0.2, 0.4):
        ours, truth, fixed = (by.loc[tolerance, name] for name in (FALLBACK, TRUTH, FIXED))
        assert truth.violations == 0 and truth.ratio == 1
        assert ours.low <= ours.violations <= ours.high
        assert ours.ratio == pytest.approx(ours.density / truth.density)
        assert fixed.density == pytest.approx(ours.density, abs=0.02)
        assert 1 <= ours.passes <= SMALL.levels + 1
    figure = fallback.draw_fallbacks(frame, SMALL.risk)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    assert len(left.containers) == 3 and len(right.lines) == 2


def test_both_ways_of_reading():
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    selector = HashSelector(shipped_or_trained(profile, model, tokenizer))
    scale = replace(SMALL, tolerances=(0.4,), tested=2)
    table = fallback.readings(profile, model, tokenizer, selector, scale=scale)
    assert list(table.index.names) == fallback.INDEX
    assert [label[1] for label in table.index] == ["ranked"] * 3 + ["half drawn"] * 3
    by = table.xs(FALLBACK, level="policy").density.droplevel("tolerance")
    assert by[512, "ranked"] != by[512, "half drawn"] and (by < 1).all()


def test_the_notebook_tests_enough_head_steps():
    brief = fallback.BRIEF
    assert brief.tested * brief.rows * 32 >= 20_000  # 4 layers of 8 heads


def test_the_command_writes_a_table_with_the_weights_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path))
    scale = replace(SMALL, tolerances=(0.4,), fitting=2, calibration=3, tested=1, rows=2)
    read = []

    def measure(profile, model, tokenizer, selector, lengths):
        read.append(selector)
        return fallback.readings(profile, model, tokenizer, selector, lengths, scale)

    asked = ["--profile", "embedded", "--weights", "64_bits"]
    assert own_run.run(fallback.NAME, "", measure, arguments=asked) == 0
    assert read[0].weights.config.bits == 64
    written = Path(capsys.readouterr().out.strip())
    assert written.name == "05_fallback_readings.csv" and tmp_path in written.parents
    assert len(pd.read_csv(written)) == 6
    with pytest.raises(SystemExit):
        own_run.run(fallback.NAME, "", measure, arguments=["--profile", "tiny", "--weights", "65"])

"""Quality beside speed: the record's form, and errors against selection_metrics."""

import pandas as pd
import pytest
import torch

from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.bench import quality
from hashattn.reproduce.bench.ways import WAYS
from hashattn.reproduce.experiments.reading import output_errors
from hashattn.selectors import fit_slopes
from hashattn.selectors.hash import HashSelector


def test_the_record_has_every_ways_error():
    table = quality.stored()
    assert list(table.index) == list(WAYS)
    fractions = [f"1/{f}" for f in quality.FRACTIONS]
    assert list(table.columns) == [(name, f) for name in quality.MODELS for f in fractions]
    assert table["embedded"].notna().all(axis=None)
    errors = table.loc["default", "embedded"]
    assert errors.tolist() == sorted(errors) and 0.05 < errors["1/8"] < 0.15
    assert table.loc["paper", ("embedded", "1/32")] > table.loc["default", ("embedded", "1/32")]


def test_without_a_record_the_table_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "path", lambda: tmp_path / "absent.csv")
    assert quality.stored().empty
    assert pd.DataFrame({("a", "b"): {"default": 1.0}}).join(quality.stored()).shape == (1, 1)


def test_ranked_errors_are_those_of_selection_metrics_and_drawn_ones_differ():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, n, 16, generator=generator) for h, n in ((4, 8), (2, 512), (2, 512)))
    layer = CapturedLayer(0, q, torch.arange(504, 512), k, 0.25, values=v)
    config = HashConfig((0,), 4, 2, 16, depth=1, folds=3)
    selector = fit_slopes(HashSelector(HashWeights.random(config, 0)), [layer])
    errors = output_errors(
        [layer], {"default": selector, "default_drawn": selector}, (4, 4), fractions=(8, 16)
    )
    (expected,) = selection_metrics([layer], {"default": selector}, [512 // 8 - 8], 4, 4)
    assert errors["default", 8] == [pytest.approx(expected["output_error"], rel=1e-5)]
    assert errors["default", 8] < errors["default", 16]
    assert errors["default_drawn", 8] != errors["default", 8]

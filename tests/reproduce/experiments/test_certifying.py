"""Notebook 05's certified reading, on the smallest run of the embedded model."""

import pytest

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common
from hashattn.reproduce.experiments.certifying import certified_claims, certified_reading
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import HashSelector


def test_a_tighter_bound_reads_more_and_changes_less(results, tmp_path):
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    selector = HashSelector(common.shipped_or_trained(profile, model, tokenizer))
    table = certified_reading(profile, model, tokenizer, selector, (0.05, 0.3), progress=False)
    assert table.index.names == ["method", "tolerance"] and len(table) == 7
    alone, by_8, by_4, true = (
        table.loc[name] for name in ("the budget alone", "certified by 8 bits",
                                     "certified by 4 bits", "true weights")
    )  # fmt: skip
    assert alone.index.tolist() == [1.0] and alone["density"].item() < 1 / 16
    assert by_8["density"].is_monotonic_decreasing and by_8["kl"].is_monotonic_increasing
    assert (by_4["density"] >= by_8["density"]).all()
    assert (by_8["density"] > true["density"]).all() and (by_8["kl"] < alone["kl"].item()).all()
    claims = Claims("05_trust", tmp_path)
    certified_claims(claims, table, "a model")
    ratio = by_8.loc[0.05, "density"] / true.loc[0.05, "density"]
    assert claims.records[0].ours == pytest.approx(ratio) and len(claims.records) == 2

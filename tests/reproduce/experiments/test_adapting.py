"""Adapting to other domains, the whole experiment in small, and what is made of its table."""

from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from hashattn.hashing import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import adapting
from hashattn.reproduce.experiments.adapting import ADAPTED, ALONE, BEFORE, BRIEF, AdaptScale
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.trust.retraining.versions import LINEAGE, Versions

SMALL = AdaptScale(length=512, sequences=4, replay=2, rows=24, steps=2, alone=2, tested=1)


def test_each_domain_is_adapted_to_and_trained_on_alone(results):
    profile = load_profile("embedded")
    model, tokenizer = load_model(profile)
    weights = HashWeights.load(profile.hash_weights_path, model)
    table = adapting.adaptations(profile, model, tokenizer, weights, ["code"], SMALL)
    assert table["weights"].tolist() == [BEFORE, ADAPTED, ALONE]
    assert table[["new", "old"]].stack().between(0, 1).all()
    assert table["cpu_seconds"].isna().tolist() == [True, False, False]
    assert (table["seconds"][1:] > 0).all()
    versions = Versions(profile.results / "adapting" / "code" / "versions")
    assert versions.load(name="v0001").sha256 == weights.sha256
    card = versions.load(model).card
    assert card["data"]["new"]["sequences"] == 4 and card["data"]["replay"]["sequences"] == 2
    assert card[LINEAGE]["parent"] == weights.sha256
    alone = HashWeights.load(profile.results / "adapting" / "code" / "alone", model)
    assert alone.card["data"]["train"]["sequences"] == 3  # what adapting trains on
    assert alone.card["recipe"]["steps"] == 2 and "started_from" not in alone.card
    ((_, row),) = adapting.closed(table).iterrows()
    by = table.set_index("weights")
    gap = by["new"][ALONE] - by["new"][BEFORE]
    assert row["closed"] == pytest.approx((by["new"][ADAPTED] - by["new"][BEFORE]) / gap)


def test_shares_claims_and_bars_by_hand(tmp_path):
    table = pd.DataFrame([
        {"domain": domain, "weights": name, "new": new, "old": old, "cpu_seconds": cpu}
        for domain in ("code", "minutes_ja")
        for name, new, old, cpu in (
            (BEFORE, 0.4, 0.5, None), (ADAPTED, 0.55, 0.49, 60.0), (ALONE, 0.6, 0.3, 90.0)
        )
    ])  # fmt: skip
    shares = adapting.closed(table)
    assert shares.loc["code"].round(6).to_dict() == {
        "gap": 0.2, "closed": 0.75, "old_lost": 0.01, "cpu_seconds": 60.0
    }  # fmt: skip
    claims = Claims("05", tmp_path)
    adapting.adapting_claims(claims, shares)
    texts = claims.table()
    assert len(texts) == 6
    figure = Figure()
    axis = figure.subplots()
    adapting.recall_bars(axis, table)
    assert sorted(round(bar.get_height(), 6) for bar in axis.patches) == sorted(
        2 * [0.4, 0.5, 0.55, 0.49, 0.6, 0.3]
    )
    assert [label.get_text() for label in axis.get_xticklabels()][0] == "source code"


def test_a_brief_run_is_of_the_same_lengths():
    assert BRIEF.length == AdaptScale().length and BRIEF.sequences < AdaptScale().sequences


def test_sequences_without_room_beside_the_window_read_as_many_heavy_tokens(monkeypatch):
    asked = []

    def notes(layers, selectors, heavy, sink, local):
        asked.append(heavy)
        return [{"recall@32": 1.0}]

    monkeypatch.setattr(adapting, "selection_metrics", notes)
    monkeypatch.setattr(adapting.HashSelector, "as_trained", lambda weights: None)
    profile = SimpleNamespace(sink=4, local=28)
    for length in (2048, 1024):
        assert adapting._recall(None, [], profile, AdaptScale(length=length)) == 1.0
    assert asked == [[32], [32]]

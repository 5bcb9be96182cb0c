"""Notebook 05's experiments: one audited answer, watched traffic, and what is claimed of them."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common, watching
from hashattn.reproduce.experiments.watching import DriftScale
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import HashSelector, make_selector
from hashattn.trust.drift.reference import DriftReference


@pytest.fixture(scope="module")
def embedded():
    """(profile, model, tokenizer, selector) of the smallest run of the embedded model."""
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    weights = common.shipped_or_trained(profile, model, tokenizer)
    return profile, model, tokenizer, HashSelector(weights)


def test_an_answer_is_sparse_from_its_first_token_and_its_passages_are_counted(embedded, results):
    profile = load_profile("tiny")
    seen = watching.audited_answer(profile, *embedded[1:], 1 / 16, 4, 1024)
    assert seen.answer and seen.evidence.tokens[0] == 0
    assert seen.receipt.density <= 1 / 16 and seen.page.is_file()
    passages = seen.passages(3)
    assert passages["dense"].is_monotonic_decreasing and len(passages) == 3
    layers = [seen.evidence.layer(0, layer) for layer in seen.evidence.layers]
    sums = np.concatenate([layer.masses.astype(float) for layer in layers], axis=1).mean(axis=1)
    for (start, end, text), row in passages.iterrows():
        assert seen.record.context[start:end].strip() == text
        number = next(
            number for number in range(len(seen.evidence.source.passages))
            if (place := seen.evidence.source.place_of_passage(number)).source == "context.txt"
            and (place.start, place.end) == (start, end)
        )  # fmt: skip
        assert row.tolist() == pytest.approx(sums[:, number].tolist(), abs=1e-3)


def test_the_recent_tokens_and_the_named_passage_are_all_that_an_answer_needs(embedded, results):
    ask = partial(watching.audited_answer, load_profile("tiny"), *embedded[1:3])
    (start, end, _), *_ = ask(embedded[3], 1 / 16, 4, 1024).passages(1).index
    blind = ask(make_selector("window"), 1 / 16, 4, 1024, keep=[])
    told = ask(make_selector("window"), 1 / 16, 4, 1024, keep=[(start, end)])
    assert told.right and not blind.right
    kept = told.receipt.settings["kept_tokens"]
    for answer, read in ((blind, 32), (told, 32 + kept)):
        assert answer.receipt.tokens_read == read * answer.receipt.decode_calls
    read = told.passages(100)["read"].droplevel("passage")
    assert read.idxmax() == (start, end) and (read > 0).sum() < 5


def test_traffic_is_calibrated_on_watched_and_studied(embedded, results):
    profile = load_profile("tiny")
    scale = DriftScale(calibrated=12, warmup=4, usual=2, shifted=2, served=1, steps=100, seeds=2)
    seen = watching.watched_traffic(
        profile, *embedded[1:], 1 / 8, "minutes", ["code", "minutes_ja"], scale
    )
    assert seen.shift == 64 and seen.monitor.report().steps == 128
    assert seen.study.index.tolist() == [
        ("minutes", "minutes"), ("minutes", "code"), ("minutes", "minutes_ja"),
    ]  # fmt: skip
    saved = DriftReference.load(profile.results / "drift")
    np.testing.assert_array_equal(saved.counts, seen.reference.counts)


def test_a_small_profile_is_watched_in_small():
    assert DriftScale.of(load_profile("embedded")) == DriftScale()
    assert DriftScale.of(load_profile("tiny")).calibrated < DriftScale().calibrated


def test_a_shift_that_is_never_seen_and_a_false_alarm_are_claimed_as_missed(results):
    rows = [
        {"stream": "usual", "streams": 20, "alarms": 5, "delay": None},
        {"stream": "code", "streams": 20, "alarms": 1, "delay": float("inf")},
        {"stream": "prose", "streams": 20, "alarms": 20, "delay": 9.0},
    ]
    claims = Claims("05_trust", results)
    watching.drift_claims(claims, watching.study_table(rows, "minutes"), "a model")
    table = claims.table()
    verdicts = dict(zip(table["claim"], table.iloc[:, -1], strict=True))
    assert [verdict.split()[0] for verdict in verdicts.values()] == ["not", "not", "met"], verdicts
    assert pd.Series(verdicts).index.str.startswith("a model, minutes").all()

"""Notebook 04's hot set: what is measured, and what it would mean, worked out by hand."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import hot_set
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector


def one_line(**columns):
    index = pd.MultiIndex.from_tuples([("ranked", 32)], names=["reading", "fraction"])
    return pd.DataFrame({"again": 0.6, "union": 1.0} | columns, index=index)


def test_llama_at_128k_by_hand():
    # 4,096 tokens of 8 KV heads and 32 layers: 1,048,576 rows of 512 bytes a step, 5 % of them cold
    worked = hot_set.worked_out(
        one_line(**{"0.25": 0.95}), hot_set.llama(), 131072, shares=[1 / 4],
        links={"PCIe 5 x16": 64e9}, cold_row_us=11,
    )  # fmt: skip
    line = worked.loc["ranked", 32, 0.25]
    codes, kv, rows = 131072 * 256 * 4, 131072 * 131072, 1_048_576
    assert line.to_dict() == pytest.approx({
        "device GB": (codes + kv / 4) / 1e9, "all GB": kv / 1e9, "hits": 0.95,
        "read MB": rows * 512 / 1e6, "fetched rows": 52428.8, "fetched MB": 26.8435456,
        "PCIe 5 x16 us": 419.4304, "cold file us": 576716.8,
        "on device us": (codes + rows * 512) / 3.35e6, "dense us": kv / 3.35e6,
    })  # fmt: skip
    assert hot_set.in_words(worked) == (
        "n/32 ranked, a hot set of 1/4: 4.4 of 17.2 GB stay on the device; of 537 MB that a step "
        "reads 95.0% are there, and to fetch the other 27 MB takes 419 us over PCIe 5 x16, or "
        "576,717 us from a file that no cache holds, beside 200 us for codes and rows on the "
        "device and 5,128 us for dense attention there."
    )


def test_twice_the_union_is_twice_the_rows():
    model, one, two = hot_set.llama(), {"0.25": 0.9, "0.5": 0.98}, {"union": 2.0}
    once, twice = (hot_set.worked_out(one_line(**one | more), model, 4096) for more in ({}, two))
    for name in ("read MB", "fetched rows", "PCIe 4 x16 us", "cold file us"):
        assert (twice[name] / once[name]).tolist() == pytest.approx([2, 2])
    assert once.index.get_level_values("hot set").tolist() == [0.25, 0.5]
    assert (once["fetched MB"].iloc[0] / once["fetched MB"].iloc[1]) == pytest.approx(5)


@pytest.fixture(scope="module")
def measured():
    """Of the embedded model, 512 tokens, the last 24 read, 12 of them counted."""
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hot_set, "_STEPS", 24)
        patched.setattr(hot_set, "_WARM", 12)
        table = hot_set.hot_set_table(profile, model, tokenizer, make_selector("oracle"), [512])
    return table, model.config.num_hidden_layers


def test_the_table_has_every_reading_budget_and_layer(measured):
    table, layers = measured
    wanted = [
        (512, reading, fraction, layer)
        for reading in (hot_set.RANKED, hot_set.DRAWN, hot_set.KEPT)
        for fraction in (32, 16, 8)
        for layer in range(layers)
    ]
    assert table.index.tolist() == wanted
    hits = table.drop(columns=["again", "union"])
    assert [float(name) for name in hits] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]
    assert (hits.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None) and (hits <= 1).all(axis=None)
    means = hot_set.by_budget(table)
    assert len(means) == 9
    own = hot_set.by_layer(table.loc[512])["again"]
    assert own.index.tolist() == list(range(layers))
    assert means.loc[(512, "ranked", 32), "again"] == pytest.approx(own.mean())


def test_drawing_with_new_coins_reuses_less_than_with_kept_ones(measured):
    means = hot_set.by_budget(measured[0]).loc[512]
    drawn, kept = (means.loc[reading]["again"] for reading in (hot_set.DRAWN, hot_set.KEPT))
    assert (drawn < kept).all()


def test_a_line_for_each_budget_and_reading(measured):
    figure, axis = plt.subplots()
    hot_set.hit_lines(axis, measured[0].loc[512])
    labels = [line.get_label() for line in axis.get_lines()]
    assert labels == [f"n/{n}, {how}" for n in (32, 16, 8) for how in ("ranked", "half drawn")]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [
        "1/16", "1/8", "1/4", "1/2", "3/4",
    ]  # fmt: skip
    plt.close(figure)

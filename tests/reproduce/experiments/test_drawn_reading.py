"""Ranked and drawn reading side by side: who takes part, what is compared, what is drawn of it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from hashattn.evaluation.methods import check_methods
from hashattn.evaluation.statistics import SAME
from hashattn.hashing import CapturedLayer
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common, divergence, drawing
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector


def captured(layer):
    generator = torch.Generator().manual_seed(layer)
    queries, keys = (torch.randn(h, n, 16, generator=generator) for h, n in ((4, 8), (2, 400)))
    return CapturedLayer(layer, queries, torch.arange(392, 400), keys, scaling=0.5, values=keys)


def test_methods_that_rank_get_slopes_of_the_layers_that_are_asked_for():
    given = {"oracle": make_selector("oracle"), "lsh 64 bits": make_selector("lsh", bits=64),
             "quest": make_selector("quest"), "magicpig": make_selector("magicpig")}  # fmt: skip
    found = drawing.drawable(given, [captured(0), captured(1), captured(1)], layers=[1])
    assert list(found) == ["oracle", "lsh 64 bits"] and found["oracle"] is given["oracle"]
    assert list(found["lsh 64 bits"].slopes) == [1]
    assert drawing.drawable(found, [])["lsh 64 bits"] is found["lsh 64 bits"]  # has its own


def test_others_sample_beside_each_base_by_their_own_rules():
    found = drawing.samplers({"oracle": make_selector("oracle")}, ["oracle"], [captured(0)], seed=3)
    rules = [(s.share, s.epsilon, s.proposal, s.seed) for n, s in found.items() if n != "magicpig"]
    assert rules == [(0.5, None, "uniform", 3), (0.25, 0.1, "uniform", 3),
                     (0.5, None, "weights", 3)]  # fmt: skip
    assert found["magicpig"].centers[0].shape == (2, 16)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A document of two kinds by rank and drawn, of the tiny profile's model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASHATTN_RESULTS", str(tmp_path_factory.mktemp("results")))
        profile = replace(load_profile("tiny"), texts=("code", "prose"), documents=1,
                          document_lengths=(1024,))  # fmt: skip
        loaded = load_model(profile)
        ranked = {"oracle": make_selector("oracle")}
        own = {"residual of oracle": make_selector("residual", base=ranked["oracle"])}
        methods = drawing.drawn_methods(profile, ranked, own, [1 / 8], seeds=2)
        check_methods(methods, common.protocol(profile, 1024))
        return methods, divergence.fidelity(profile, *loaded, methods, progress=False)


def test_every_density_is_read_by_rank_and_drawn_with_seeds_of_its_own(read):
    methods, rows = read
    names = ["oracle", "oracle drawn", "oracle drawn 1", "residual of oracle"]
    assert [m.name for m in methods] == names
    assert [m.budget.sampled for m in methods] == [0, 0.5, 0.5, 0]
    assert [m.budget.seed for m in methods[1:3]] == [0, 1]
    kl = rows.groupby("method")["kl"].mean()
    assert set(kl.index) == set(names) and kl["oracle drawn"] != kl["oracle drawn 1"]
    assert kl["oracle drawn"] < kl["oracle"]


def test_verdicts_pair_a_method_with_itself_by_rank_and_with_exact_top_k(read):
    table = drawing.drawn_verdicts(read[1])
    assert list(zip(table["method"], table["against"], strict=True)) == [
        ("oracle drawn", "oracle"), ("oracle drawn 1", "oracle"),
    ]  # fmt: skip
    lines = [
        {"method": method, "budget": "8x", "dataset": "code", "sample": f"s{n}", "kl": kl + noise}
        for method, kl in (("oracle", 0.2), ("hash", 0.5), ("hash drawn", 0.2))
        for n, noise in enumerate((0.01, -0.01, 0.02, -0.02) if method == "oracle" else 4 * [0.0])
    ]
    made = drawing.drawn_verdicts(pd.DataFrame(lines)).set_index("against")
    assert made.loc["hash", "verdict"] == "better" and made.loc["oracle", "verdict"] == SAME
    assert made.loc["hash", "difference"] == pytest.approx(-0.3)
    assert made.loc["hash", ["drawn", "ranked"]].tolist() == pytest.approx([0.2, 0.5])


def test_errors_of_a_sequence_are_told_with_bias_and_spread_apart():
    profile = replace(load_profile("tiny"), lengths=(1024,), layers=(1,))
    model, tokenizer = load_model(profile)
    ranked = {"oracle": make_selector("oracle")}
    table = drawing.drawn_errors(profile, model, tokenizer, ranked, [1 / 8, 1 / 16], draws=2)
    assert table.index.names == ["method", "budget", "reading"]
    by_rank, drawn = (table.loc[("oracle", "1/16", reading)] for reading in ("ranked", "drawn"))
    assert by_rank["spread"] == 0 and by_rank["bias"] == pytest.approx(by_rank["error"])
    assert (
        drawn["spread"] > 0 and table.loc[("oracle", "1/8", "ranked"), "error"] < by_rank["error"]
    )


def test_claims_hold_drawn_codes_against_exact_top_k():
    index = [("oracle", "8x"), ("oracle", "16x"), ("hash_64 drawn", "8x"), ("hash_64 drawn", "16x")]
    measured = {"kl": [0.1, 0.2, 0.009, 0.1], "agreement": [95, 94, 99, 96]}
    names = ["method", "budget"]
    short = pd.DataFrame(measured, index=pd.MultiIndex.from_tuples(index, names=names))
    table = pd.concat(
        {1024: short, 2048: short.assign(kl=[0.1, 0.2, 0.02, 0.03])}, names=["tokens"]
    )
    claims = Claims("test")
    drawing.drawn_claims(claims, table, "made")
    found = claims.table()
    assert found["verdict"].tolist() == ["met", "not met", "not met", "not met", "met", "not met"]
    assert found["claim"].str.contains("made, 2048 tokens").sum() == 3


def test_lines_of_both_readings_share_a_colour(read):
    figure, axis = plt.subplots()
    drawing.drawn_lines(axis, divergence.by_length(read[1]).loc[1024])
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["oracle"].get_color() == lines["oracle drawn"].get_color()
    styles = [lines[n].get_linestyle() for n in ("oracle", "oracle drawn", "residual of oracle")]
    assert styles == ["--", "-", ":"]
    plt.close(figure)

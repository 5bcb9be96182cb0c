"""Fidelity on a profile's documents, and what is made of its rows."""

from dataclasses import replace

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from hashattn.evaluation.fidelity import fidelity_protocol
from hashattn.evaluation.statistics import SAME
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common, divergence
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector

BITS = {"dense": 0, "oracle": 0, "lsh": 32, "socket": 128, "hash": 32, "hash_64": 64}
LEVEL = {"dense": 0.0, "oracle": 0.01, "lsh": 0.5, "socket": 0.1, "hash": 0.1, "hash_64": 0.03}
PROTOCOL = fidelity_protocol(64, 8)


def made_rows(documents=6):
    """Rows of two lengths, two kinds and two budgets; KL grows by a known amount for each method,
    hash and socket differ by what alternates alone."""
    lines = []
    for tokens in (1024, 2048):
        for number in range(documents):
            for method in BITS:
                for budget, factor in (
                    (("8x", 1), ("16x", 2)) if method != "dense" else (("dense", 0),)
                ):
                    lines.append({
                        "tokens": tokens, "method": method, "budget": budget, "setup": "B",
                        "dataset": ("code", "prose")[number % 2], "sample": f"s{number}",
                        "context": f"c{number}", "protocol": "p",
                        "protocol_fields": PROTOCOL.to_dict(), "nominal_bits": BITS[method],
                        "kl": factor * LEVEL[method] + (method == "hash") * (-1) ** number * 0.004,
                        "agreement": 0.9, "nll": 1.1, "dense_nll": 1.0, "same_tokens": 3,
                        "density": 0.1 if factor else 1.0,
                    })  # fmt: skip
    return pd.DataFrame(lines)


def test_documents_of_every_kind_are_read_at_every_length(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path))
    profile = replace(load_profile("tiny"), texts=("code", "minutes_ja"), documents=1,
                      document_lengths=(512, 1024), densities=(1 / 8,))  # fmt: skip
    loaded = load_model(profile)
    selectors = {"oracle": make_selector("oracle"), "window": make_selector("window")}
    methods = common.methods(profile, selectors)
    rows = divergence.fidelity(profile, *loaded, methods, progress=False)
    assert set(rows.tokens) == {512, 1024}
    assert set(rows.dataset) == {"code", "minutes_ja"} and set(rows.setup) == {"B"}
    room = rows.tokens - 64 - 32  # read and generated; cutting the middle may cost a few more
    assert ((rows.context_tokens >= room) & (rows.context_tokens <= room + 8)).all()
    kl = rows.groupby("method").kl.mean()
    assert kl["dense"] < 1e-6 < kl["oracle"] < kl["window"]
    table = divergence.by_length(rows)
    assert table.index.names == ["tokens", "method", "budget"] and len(table) == 2 * 3
    assert divergence.by_kind(rows, "8x").columns.tolist() == ["code", "minutes_ja"]


def test_budgets_side_by_side():
    table = divergence.by_length(made_rows())
    wide = divergence.by_budget(table)
    assert wide.columns.tolist() == [(m, b) for m in ("kl", "agreement") for b in ("8x", "16x")]
    assert wide.index.tolist() == [(n, m) for n in (1024, 2048) for m in BITS if m != "dense"]
    for tokens, method in wide.index:
        for budget in ("8x", "16x"):
            line = table.loc[(tokens, method, budget)]
            assert wide.loc[(tokens, method), ("kl", budget)] == line["kl"]
            assert wide.loc[(tokens, method), ("agreement", budget)] == line["agreement"]


def test_kinds_of_text_side_by_side():
    rows = made_rows()
    rows.loc[rows.tokens == 2048, "kl"] *= 3
    table = divergence.by_kind(rows, "16x")
    for tokens in (1024, 2048):
        expected = rows[
            (rows.tokens == tokens) & (rows.method == "lsh") & (rows.budget == "16x")
            & (rows.dataset == "prose")
        ]  # fmt: skip
        assert table.loc[(tokens, "lsh"), "prose"] == pytest.approx(expected.kl.mean())
    assert list(table.columns) == ["code", "prose"]
    assert "dense" not in table.index.get_level_values("method")


def test_verdicts_compare_documents_pairwise_with_methods_of_others_alone():
    table = divergence.kl_verdicts(made_rows(), ("hash", "hash_64", "hash_128"))
    assert set(table.method) == {"lsh", "socket"} and set(table.codes) == {"hash", "hash_64"}
    assert len(table) == 2 * 2 * 2 * 2  # codes, lengths, budgets, methods
    line = table.set_index(["codes", "tokens", "method", "budget"]).loc[
        ("hash", 1024, "lsh", "16x")
    ]
    assert line["verdict"] == "better" and line["difference"] == pytest.approx(-0.8, abs=0.01)
    assert line["low"] < line["difference"] < line["high"] < 0
    even = table[(table.codes == "hash") & (table.method == "socket")]
    assert set(even.verdict) == {SAME} and set(even.as_many_bits) == {True}
    wider = table[(table.codes == "hash_64") & (table.method == "lsh")]
    assert set(wider.as_many_bits) == {False}


def test_claims_are_made_where_64_bits_and_the_oracle_ran():
    claims, rows = Claims("test"), made_rows()
    divergence.fidelity_claims(claims, divergence.by_length(rows), "made")
    table = claims.table().set_index("claim")
    ratio = table.loc["made, 2048 tokens, 64 bits at 16x: KL to dense over exact top-k's (ratio)"]
    assert ratio["verdict"] == "not met" and len(table) == 4
    none = Claims("none")
    divergence.fidelity_claims(none, divergence.by_length(rows[rows.method != "hash_64"]), "made")
    assert none.table().empty


def test_lines_are_drawn_for_what_is_sparse():
    figure, axis = plt.subplots()
    rows = made_rows()
    divergence.divergence_lines(axis, divergence.by_length(rows).loc[1024])
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    assert labels == set(BITS) - {"dense"} and axis.get_yscale() == "log"
    plt.close(figure)

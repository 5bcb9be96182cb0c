"""Notebook 02's frontier: contenders, rows, verdicts against differences by hand."""

import pandas as pd
import pytest

from hashattn.access import load_model
from hashattn.hashing import HashWeights
from hashattn.profiles import load_profile
from hashattn.reproduce import experiments
from hashattn.reproduce.frontier import contenders, error_lines, frontier, summary, verdicts


@pytest.fixture(scope="module")
def rows():
    profile = load_profile("tiny")
    model, tokenizer = load_model(profile)
    weights = HashWeights.load(profile.hash_weights_path, model)
    calibrated = experiments.captured(profile, model, tokenizer, 512, 1, split="train")
    chosen = contenders(profile, weights, calibrated)
    return frontier(profile, model, tokenizer, chosen, [1024], [1 / 4, 1 / 8], count=1)


def test_methods_store_what_they_are_compared_at(rows):
    bits = rows.groupby("method")["bits"].first()
    assert bits["hash"] == bits["hash asymmetric, re-ranked 4x"] == bits["lsh 32 bits"] == 32
    assert bits["quest page 16, 16 bits"] == bits["lsh 128 bits"] == 128
    assert bits["double_sparsity 4-bit labels"] == 128
    assert bits["quest page 16, 4 bits"] == 36 and bits["double_sparsity 2-bit labels"] == 64


def test_budgets_are_densities_and_the_oracle_is_best(rows):
    found = rows.groupby("budget")["density"].mean()
    assert found[1 / 4] == pytest.approx(1 / 4, rel=0.05)
    assert found[1 / 8] == pytest.approx(1 / 8, rel=0.05)
    table = summary(rows)
    assert list(table.columns) == ["1/4", "1/8"]
    errors = table.droplevel("bits")["1/8"]
    assert errors["oracle"] < errors["hash asymmetric, re-ranked 4x"] < errors["hash"]
    assert errors["hash"] < errors["lsh 32 bits"] and errors.max() < 1.5


def test_verdicts_by_hand():
    """Two sequences of two layers: always better, always worse, and both."""
    lines = []
    for sequence in range(2):
        for layer in range(2):
            here = {"sequence": sequence, "layer": layer, "context": 64, "budget": 1 / 8}
            base = 0.1 * (1 + layer)
            sign = 1 if sequence else -1
            for method, bits, error in (
                ("hash", 32, base), ("quest", 32, base + 0.02), ("lsh", 64, base - 0.03),
                ("magicpig", 32, base + sign * 0.04), ("random", 0, 0.0), ("oracle", 0, 0.0),
                ("hash asymmetric", 32, 0.0),
            ):  # fmt: skip
                lines.append(here | {"method": method, "bits": bits, "output_error": error})
    table = verdicts(pd.DataFrame(lines), "hash").set_index("method")
    assert set(table.index) == {"quest", "lsh", "magicpig"}  # not fewer bits, own family, oracles
    assert table.verdict.to_dict() == {
        "quest": "better", "lsh": "worse", "magicpig": "not distinguishable",
    }  # fmt: skip
    assert table.difference["quest"] == pytest.approx(-0.02)
    assert table.low["magicpig"] < 0 < table.high["magicpig"]


def test_lines_are_drawn_and_labelled(rows):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    error_lines(axis, summary(rows), ["hash", "lsh 32 bits"])
    labels = [line.get_label() for line in axis.get_lines()]
    assert labels == ["hash (32 bits)", "lsh 32 bits (32 bits)"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1/4", "1/8"]
    plt.close(figure)

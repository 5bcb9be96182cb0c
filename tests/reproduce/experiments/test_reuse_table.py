"""Notebook 02's table of reuse: which density gives the error of a selection of its own."""

import pandas as pd
import pytest

from hashattn.reproduce.experiments.reuse import density_for, reuse_table


def rows():
    lines = []
    for every, worse in ((1, 1.0), (2, 2.0)):
        for budget in (1 / 16, 1 / 8, 1 / 4):
            lines.append({"kind": "steps", "every": every, "budget": budget, "overlap": 1 / every,
                          "density": budget, "output_error": worse * 0.01 / budget})  # fmt: skip
    return pd.DataFrame(lines)


def test_twice_the_error_at_an_error_that_halves_with_twice_the_tokens_needs_twice_as_many():
    table = reuse_table(rows(), 1 / 8)
    assert table.loc[("steps", 1), "reads"] == pytest.approx(1)
    assert table.loc[("steps", 2), "reads"] == pytest.approx(2)
    assert table.loc[("steps", 2), "overlap"] == 0.5
    assert reuse_table(rows(), 1 / 4).loc[("steps", 2), "reads"] == float("inf")


def test_densities_between_measured_ones_lie_on_a_line_of_logarithms():
    part = rows()[lambda r: r.every == 1]
    assert density_for(part, 0.1) == pytest.approx(0.1)

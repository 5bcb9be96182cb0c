"""RULER's tables of notebook 03, from planted rows."""

import pandas as pd
import pytest

from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.experiments import needles
from hashattn.reproduce.experiments.needles import answered, ruler_claims, ruler_table
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector

POINTS = {  # by setup, method: scores of the tasks easy, half and hard
    ("A", "dense"): (1.0, 0.5, 0.2), ("A", "hash"): (1.0, 0.45, 0.9),
    ("B", "dense"): (1.0, 0.4, 0.2), ("B", "hash"): (0.9, 1.0, 1.0),
}  # fmt: skip


@pytest.fixture
def table():
    rows = [
        {"setup": setup, "tokens": tokens, "method": method, "dataset": task, "score": score,
         "budget": "dense" if method == "dense" else "16x", "cut_tokens": 0, "protocol": "p",
         "protocol_fields": {}, "sample": f"{task} {number}"}
        for tokens in (2048, 4096)
        for (setup, method), scores in POINTS.items()
        for task, score in zip(("easy", "half", "hard"), scores, strict=True)
        for number in range(3)
    ]  # fmt: skip
    return ruler_table(pd.DataFrame(rows))


def test_our_codes_are_drawn_too_at_the_budget_that_is_claimed():
    profile = load_profile("embedded")
    selectors = {name: make_selector("oracle") for name in ("oracle", "hash", "hash_128")}
    methods = needles.with_drawn(profile, experiments.methods(profile, selectors), selectors)
    drawn = [m for m in methods if m.budget is not None and m.budget.sampled]
    assert [(m.name, m.budget_label) for m in drawn] == [
        ("hash drawn", "16x"), ("hash_128 drawn", "16x"),
    ]  # fmt: skip
    labels = [(m.name, m.budget_label) for m in methods]
    assert len(labels) == len(set(labels)) == 1 + 3 * len(profile.densities) + 2


def test_points_are_by_setup_length_and_task(table):
    assert table.loc[("A", 2048, "hash", "16x")].to_dict() == pytest.approx(
        {"easy": 100, "half": 45, "hard": 90, "average": 235 / 3, "samples": 3}
    )
    assert len(table) == 8


def test_what_dense_attention_answers_is_compared(table):
    found = answered(table)
    assert found.loc[("A", 4096, "hash", "16x")].tolist() == pytest.approx([2, 72.5, -2.5])
    assert found.loc[("B", 4096, "hash", "16x")].tolist() == pytest.approx([1, 90, -10])
    assert (found.xs("dense", level="method")["minus dense"] == 0).all()


def test_goals_are_of_the_methods_that_ran_and_of_answered_tasks(table, tmp_path):
    claims = Claims("03_longbench", tmp_path)
    ruler_claims(claims, answered(table), "a model", ["hash", "absent"])
    assert [r.ours for r in claims.records] == pytest.approx([-2.5, -2.5, -10, -10])
    assert {r.verdict.split()[0] for r in claims.records} == {"not"} and claims.records[0].goal
    assert "RULER, 2048 tokens, setup A: hash at 16x" in claims.records[0].claim
    none = table.assign(easy=10.0, half=10.0)
    ruler_claims(claims, answered(none), "a model", ["hash"])
    assert len(claims.records) == 4

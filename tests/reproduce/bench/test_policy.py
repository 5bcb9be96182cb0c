"""The measured policy: which steps were dense, and the ratio that is reported."""

import math

import pytest

from hashattn.attention.break_even import BreakEven, StepTimes
from hashattn.attention.budget import Budget
from hashattn.reproduce.bench.policy import policy_latency, policy_table
from hashattn.selectors.oracle import OracleSelector
from helpers import tiny_model

BUDGET = Budget(sink=2, local=4, heavy=6)


def even_at(tokens):
    """A BreakEven at a number of tokens, None for no length."""
    lengths, slope = (32, 512), 0 if tokens is None else 1 / tokens
    dense = StepTimes.of(lengths, [[(1 + slope * n) / 1e3] * 3 for n in lengths])
    return BreakEven(lengths, dense, StepTimes.of(lengths, [[2e-3] * 3] * 2), 512)


@pytest.fixture(scope="module")
def rows():
    model = tiny_model("llama")
    found = policy_latency("tiny", model, OracleSelector(), BUDGET, (40, 200), rounds=2, steps=3,
                           even=even_at(150))  # fmt: skip
    assert not any(m._forward_pre_hooks for m in model.modules())
    return found


def test_steps_are_dense_below_the_break_even_and_sparse_from_it_on(rows):
    assert [(row["variant"], row["n"]) for row in rows] == [
        ("own", 40), ("policy", 40), ("own", 200), ("policy", 200)
    ]  # fmt: skip
    policy = [row for row in rows if row["variant"] == "policy"]
    assert [row["sparse"] for row in policy] == [False, True]
    assert {row["dense_below"] for row in policy} == {150}
    assert all(0 < row["q1"] <= row["ms"] <= row["q3"] for row in rows)


def test_the_speed_up_is_the_policy_s(rows):
    table = policy_table(rows)
    threads = rows[0]["threads"]
    line = table.loc["tiny", threads, 200]
    assert line["speed-up"] == pytest.approx(rows[2]["ms"] / rows[3]["ms"])
    assert table["step"].tolist() == ["dense", "sparse"]
    assert table["dense below"].tolist() == [150, 150]


def test_where_sparse_never_wins_all_steps_are_dense():
    rows = policy_latency("tiny", tiny_model("llama"), OracleSelector(), BUDGET, (300,), rounds=1,
                          steps=2, even=even_at(None))  # fmt: skip
    assert rows[1]["dense_below"] is None and not rows[1]["sparse"]
    assert policy_table(rows)["dense below"].tolist() == [math.inf]

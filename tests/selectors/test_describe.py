"""describe: one row of a table of methods."""

import json

import pytest
import torch

from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.selectors import METHODS, describe, make_selector
from hashattn.selectors.lsh import LSHSelector
from hashattn.selectors.window import WindowSelector

CENTERS = {0: torch.zeros(2, 8)}
HASH = HashWeights.random(HashConfig((0,), 4, 2, 8, "per_kv_head", 32, depth=2, hidden=16), 0)
WEIGHTS = {"hata": {0: torch.ones(2, 8, 64)}, "hash": HASH}


@pytest.mark.parametrize(
    ("name", "parameters", "nominal", "stored", "tokens", "needs"),
    [
        ("dense", {}, 0, 0, "reads all", "nothing"),
        ("oracle", {}, 0, 0, "retrieves", "nothing"),
        ("random", {}, 0, 0, "retrieves", "nothing"),
        ("lsh", {"bits": 64}, 64, 64, "retrieves", "nothing"),
        ("lsh", {"bits": 64, "centers": CENTERS}, 64, 64, "retrieves", "calibration"),
        ("magicpig", {"bits": 4, "tables": 8}, 32, 128, "retrieves", "nothing"),
        ("magicpig", {"bits": 4, "tables": 8, "centers": CENTERS}, 32, 128, "retrieves",
         "calibration"),
        ("quest", {}, 256, 0, "retrieves", "nothing"),
        ("double_sparsity", {"channels": {0: torch.zeros(8, 16)}}, 384, 640, "retrieves",
         "calibration"),
        ("socket", {}, 128, 128, "retrieves", "nothing"),
        ("hata", {"weights": WEIGHTS["hata"]}, 64, 64, "retrieves", "training"),
        ("hash", {"weights": WEIGHTS["hash"]}, 32, 32, "retrieves", "training"),
    ],
)  # fmt: skip
def test_a_row_says_what_a_method_stores_needs_and_does(
    name, parameters, nominal, stored, tokens, needs
):
    selector = make_selector(name, **parameters)
    row = describe(selector, group=4, head_dim=128)
    assert row == {
        "name": name,
        "nominal_bits": nominal,
        "auxiliary_bits": stored,
        "tokens": tokens,
        "needs": needs,
        "parameters": selector.record()["parameters"],
    }
    assert json.loads(json.dumps(row)) == row


def test_a_method_that_drops_tokens_for_good_evicts():
    class Dropping(WindowSelector):
        evicts = True

    assert describe(Dropping(), 4, 128)["tokens"] == "evicts"


def test_auxiliary_bits_follow_the_heads():
    selector = LSHSelector(bits=32, layout="per_query_head", query_heads=8)
    assert describe(selector, group=4, head_dim=64)["auxiliary_bits"] == 128
    assert describe(make_selector("quest"), group=4, head_dim=64)["nominal_bits"] == 128


def test_the_row_is_a_copy():
    selector = make_selector("quest")
    describe(selector, 4, 128)["parameters"]["page"] = 1
    assert selector.record()["parameters"]["page"] == 16


@pytest.mark.parametrize(("field", "value"), [("group", 0), ("head_dim", -1)])
def test_shapes_below_one_are_refused_by_name(field, value):
    shape = {"group": 4, "head_dim": 128} | {field: value}
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        describe(make_selector("quest"), **shape)


def test_describe_stays_a_function_whatever_is_imported_first():
    import hashattn.selectors
    import hashattn.selectors.describe  # noqa: F401

    assert callable(hashattn.selectors.describe)
    assert "describe" not in METHODS

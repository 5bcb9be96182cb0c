import json
import math

import pytest

from hashattn.base.files import read_json, write_json
from hashattn.reproduce.notebooks.claims import (
    Band,
    ClaimError,
    Claims,
    claims_text,
    load_cautions,
    load_claims,
    not_judged,
    tally,
)


@pytest.mark.parametrize(
    ("low", "high", "value", "inside"),
    [
        (0.5, None, 0.5, True),
        (0.5, None, 0.4999, False),
        (None, 3, 3.0, True),
        (None, 3, 3.1, False),
        (-1, 1, 0, True),
        (-1, 1, math.nan, False),
        (0, None, math.inf, True),
    ],
)
def test_band_includes_its_ends_and_never_nan(low, high, value, inside):
    assert (value in Band(low, high)) is inside


def test_band_as_text():
    texts = [str(Band(0.5)), str(Band(high=3)), str(Band(-1, 1))]
    assert texts == [">= 0.5", "<= 3", "-1 to 1"]


@pytest.mark.parametrize("ends", [(None, None), (2, 1), (math.nan, None)])
def test_band_without_sense_is_refused(ends):
    with pytest.raises(ValueError, match="is not valid"):
        Band(*ends)


def test_verdict_prints_the_same_for_any_measurement_in_the_band(tmp_path, capsys):
    printed = []
    for ours in (0.91, 0.97):
        claims = Claims("01_recall", tmp_path)
        claims.must_hold("recall@32 at 32 bits", ours, low=0.9, paper="0.95")
        claims.goal("points below dense at 16x", 10 * ours, high=9.5)
        claims.verdict()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0] == (
        "holds  recall@32 at 32 bits (>= 0.9)\ngoal   points below dense at 16x (<= 9.5)\n"
    )


def test_a_measurement_outside_its_band_raises_and_is_recorded(tmp_path):
    claims = Claims("01_recall", tmp_path)
    claims.must_hold("recall@32", 0.1216, low=0.8)
    with pytest.raises(ClaimError, match=r"recall@32: measured 0.1216, must be >= 0.8"):
        claims.verdict()
    assert load_claims(tmp_path, ["01_recall"])[0].verdict == "VIOLATED"


def test_a_goal_that_is_not_met_is_reported_only(tmp_path):
    claims = Claims("01_recall", tmp_path)
    claims.goal("score", 3, low=4)
    claims.goal("other score", 5, low=4)
    claims.verdict()
    assert [c.verdict for c in load_claims(tmp_path, ["01_recall"])] == ["not met", "met"]


def test_nan_is_outside_and_survives_json(tmp_path):
    claims = Claims("n", tmp_path)
    claims.must_hold("loss", math.nan, high=1)
    json.loads(claims.path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(load_claims(tmp_path, ["n"])[0].ours)
    with pytest.raises(ClaimError, match="measured nan"):
        claims.verdict()


def test_no_claim_and_a_repeated_claim_are_errors(tmp_path):
    claims = Claims("n", tmp_path)
    with pytest.raises(ValueError, match="makes no claim"):
        claims.verdict()
    claims.goal("same", 1, low=0)
    with pytest.raises(ValueError, match="made twice"):
        claims.must_hold("same", 1, low=0)


def test_a_new_run_of_a_notebook_starts_without_the_old_claims(tmp_path):
    Claims("n", tmp_path).goal("old", 1, low=0)
    Claims("n", tmp_path).goal("new", 1, low=0)
    assert [c.claim for c in load_claims(tmp_path, ["n", "absent"])] == ["new"]


def test_claims_go_to_the_profile_s_results(results, monkeypatch):
    monkeypatch.setenv("HASHATTN_PROFILE", "tiny")
    Claims("n").goal("score", 1, low=0)
    assert (results / "tiny" / "claims" / "n.json").is_file()


def test_table_and_text_show_measured_values(tmp_path):
    claims = Claims("n", tmp_path)
    claims.goal("a claim " * 12, 12.3456, low=0, high=20, paper="13")
    table = claims.table()
    assert table.columns.tolist() == ["claim", "paper", "ours", "tolerance", "verdict"]
    assert table["ours"].tolist() == ["12.35"]
    lines = claims_text(load_claims(tmp_path, ["n"])).splitlines()
    assert lines[0].split("|")[0].strip() == "claim"
    assert "13" in lines[2] and "12.35" in lines[2] and "0 to 20" in lines[2] and "met" in lines[2]
    assert len(lines) == 4 and max(map(len, lines)) <= 110  # the long claim is wrapped


def test_a_claim_whose_yardstick_failed_is_not_judged_whatever_the_number(tmp_path, capsys):
    claims = Claims("n", tmp_path)
    why = "dense answers 0 of 8 questions, 0 points; a comparison needs 10"
    claims.goal("ours minus dense", 0, low=-3, unjudged=why, main=True)
    claims.must_hold("ours minus theirs", -50, low=0, unjudged=why)
    claims.goal("seconds saved", 0.9, low=0.5, unjudged="")
    claims.verdict()
    out = capsys.readouterr().out
    assert f"not judged  ours minus dense (>= -3): {why}\n" in out
    assert "goal   seconds saved (>= 0.5)\n" in out
    found = load_claims(tmp_path, ["n"])
    assert [c.verdict for c in found] == ["not judged", "not judged", "met"]
    assert [c.main for c in found] == [True, False, False]
    assert tally(found, "m").startswith("0 of 0 claims hold, 1 of 1 goals met, 2 not judged; ")
    assert {reason: len(left) for reason, left in not_judged(found).items()} == {why: 2}
    assert "not judged" in claims_text(found)


def test_where_all_are_judged_the_count_is_as_ever(tmp_path):
    claims = Claims("n", tmp_path)
    claims.must_hold("a", 1, low=0)
    claims.goal("b", 1, low=2)
    assert (
        tally(claims.records, "data/embedded") == "1 of 1 claims hold, 0 of 1 goals met; about "
        "data/embedded, where a claim names no other model"
    )
    assert not_judged(claims.records) == {}


def test_claims_of_an_older_version_are_read(tmp_path):
    claims = Claims("n", tmp_path)
    claims.goal("a", 1, low=0)
    old = [{k: v for k, v in line.items() if k not in ("reason", "main")}
           for line in read_json(claims.path)]  # fmt: skip
    write_json(claims.path, old)
    assert load_claims(tmp_path, ["n"]) == claims.records


def test_cautions_are_printed_kept_and_begin_anew(tmp_path, capsys):
    for number in range(2):
        claims = Claims("n", tmp_path)
        claims.caution("")
        claims.caution(f"{number} of 8 contexts were cut")
    assert capsys.readouterr().out == "0 of 8 contexts were cut\n1 of 8 contexts were cut\n"
    assert load_cautions(tmp_path, ["n", "absent", "n"]) == ["1 of 8 contexts were cut"]

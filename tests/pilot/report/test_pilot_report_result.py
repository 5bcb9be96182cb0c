"""Results are checked before anything is drawn, and the floor decides."""

import json
import subprocess
import sys

import pytest
from pilot_samples import SAMPLES, floor, note, sample

from hashattn.pilot.report import ReportError, load_result, save_report
from hashattn.pilot.report.__main__ import main
from hashattn.pilot.report.judged import judged
from hashattn.pilot.report.result import check_result


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_of_the_form(name):
    check_result(sample(name))


def changed(path, value):
    """A sample with one field set, or removed where the value is ...; path: its keys."""
    result = sample("fallback")
    *outer, last = path
    inner = result
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["format"], 2, "format = 2: must be 1"),
        (["language"], "fr", "language = 'fr': must be one of en, ja"),
        (["title"], ..., "title is missing"),
        (["recommendation", "verdict"], "maybe", "recommendation.verdict = 'maybe'"),
        (["recommendation", "budget"], 0, "recommendation.budget = 0: must be a number above 0"),
        (["recommendation", "reasons", 1, "values"], ..., r"reasons\[1\].values is missing"),
        (["quality", 0, "questions", "low"], "x", r"quality\[0\].questions.low = 'x'"),
        (["quality", 2, "fidelity", "kl"], ..., r"quality\[2\].fidelity.kl is missing"),
        (["quality", 1, "questions", "count"], True, "count = True: must be a whole number"),
        (["floors", "text"], ..., "floors.text is missing"),
        (["documents", "scored", 0, "cut"], 1, r"scored\[0\].cut = 1: must be true or false"),
        (["latency", "dense_ms", "median"], float("nan"), "dense_ms.median = nan"),
        (["made", "settings", "SEED"], float("inf"), "not plain JSON"),
        (["changed", 0, "audit"], "https://example.org/a.html", "a path like audit/03.html"),
        (["changed", 0, "audit"], "../a.html", "a path like"),
        (["changed", 0, "audit"], "/a.html", "a path like"),
        (["changed", 0, "audit"], "//example.org/a.html", "a path like"),
        (["changed", 0, "audit"], "javascript:a.html", "a path like"),
        (["changed", 0, "audit"], "audit/..%2fa.html", "a path like"),
        (["changed", 0, "audit"], "audit/a.html\n", "a path like"),
        (["changed", 0, "audit"], "audit/a.html)![x](b.html", "a path like"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, path, value, says):
    with pytest.raises(ReportError, match=says):
        save_report(changed(path, value), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loading_gives_back_what_was_saved(tmp_path):
    result = sample("hostile")
    files = save_report(result, tmp_path)
    assert [f.name for f in (files.html, files.markdown, files.json)] == [
        "report.html", "report.md", "pilot.json",
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == sorted([files.html, files.markdown, files.json])
    assert load_result(files.json) == result  # the whole of every text, too


def test_tuples_are_lists_as_in_json(tmp_path):
    result = sample("go")
    result["monitor"] = tuple(result["monitor"])
    assert load_result(save_report(result, tmp_path).json) == sample("go")


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("[]", "must be an object"), ('{"format": 1}', "language"),
     (None, "does not exist")],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, text, says):
    path = tmp_path / "pilot.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ReportError, match=says) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


def test_a_sentence_that_lacks_leaves_the_numbers(tmp_path):
    result = sample("go")
    result["monitor"].append(note("odd"))
    with pytest.raises(ReportError, match="no sentence of report for 'odd'"):
        save_report(result, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pilot.json"]


@pytest.mark.parametrize("name", ["go", "fallback", "no_go"])
def test_clear_floors_change_nothing(name):
    assert judged(sample(name)) == sample(name)


def test_unclear_floors_take_every_verdict_away():
    result = sample("fallback")
    result["floors"] |= {"questions": None, "quotes": floor(0.1, 0.1, 0, -0.1, 0.1, 9, False)}
    after = judged(result)
    for row in after["quality"]:
        assert {row["questions"]["verdict"], row["quotes"]["verdict"]} == {"cannot_be_judged"}
        assert row["questions"]["more"] is row["quotes"]["more"] is None
        assert row["fidelity"]["verdict"] in ("kept", "lost")  # its own floor is clear
    keys = [reason["key"] for reason in after["recommendation"]["reasons"]]
    assert keys == ["not_judged", "not_judged", "fidelity_kept", "preflight_worth", "contexts_cut"]
    assert after["recommendation"]["verdict"] == "go_with_fallback"  # rests on fidelity
    result["floors"]["text"]["clear"] = False
    after = judged(result)["recommendation"]
    assert (after["verdict"], after["budget"]) == ("cannot_be_judged", None)
    assert judged(judged(result)) == judged(result)


def test_a_no_needs_a_ground_that_is_clear():
    result = sample("no_go")
    for measure in result["floors"]:
        result["floors"][measure] = None
    assert judged(result)["recommendation"]["verdict"] == "no_go"  # the pre-flight says so
    reasons = result["recommendation"]["reasons"]
    result["recommendation"]["reasons"] = [r for r in reasons if r["key"] == "quality_lost"]
    assert judged(result)["recommendation"]["verdict"] == "cannot_be_judged"


def test_the_command_writes_the_report_in_the_other_language(tmp_path, capsys):
    files = save_report(sample("go"), tmp_path)
    assert main([str(files.json), "--language", "ja"]) == 0
    assert capsys.readouterr().out.strip() == str(files.html)
    assert '<html lang="ja">' in files.html.read_text()
    assert json.loads(files.json.read_text())["language"] == "ja"
    assert main([str(files.json), "--language", "en", "--folder", str(tmp_path / "en")]) == 0
    assert load_result(tmp_path / "en" / "pilot.json") == sample("go")
    files.json.write_text("{}")
    assert main([str(files.json)]) == 1
    assert "format = None: must be 1" in capsys.readouterr().err


def test_importing_it_loads_no_picture_library():
    script = (
        "import sys, hashattn.pilot.report as r; r.save_report; r.load_result;"
        "print(sorted({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

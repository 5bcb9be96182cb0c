"""report.html of a synthetic run: words first, everything escaped, nothing off a phone's screen."""

import json
import re

import pytest

from hashattn.reproduce.notebooks.claims import Claim
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.notebooks.outcome import Outcome
from hashattn.reproduce.notebooks.report import caption, findings, render_report, short
from hashattn.reproduce.profiles import load_profile

HOSTILE = '<script>alert("1")</script>'
MANIFEST = {
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "seconds": {"03_quality": 60.0},
    "written": "2026-11-28",
    "environments": {
        "03_quality": {
            "python": "3.11.2",
            "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"gpu": None, "processor": HOSTILE, "cores": 2, "threads": 1},
        },
        "04_silent": None,
    },
}


def claim(name, ours=0.0, verdict="met", goal=True, reason="", main=False, paper=""):
    return Claim("03_quality", name, paper, ours, ">= -3", verdict, goal, reason, main)


@pytest.fixture
def outcome(results):
    """outcome(claims, cautions): a run of one notebook with a figure and two tables."""
    results = results / "tiny"
    title = {"cell_type": "markdown", "source": ["# 03 · Quality & density\n", "words"]}
    (results / "notebooks").mkdir(parents=True)
    for name, cells in (("03_quality", [title]), ("04_silent", [])):
        text = json.dumps({"cells": cells})
        (results / "notebooks" / f"{name}.ipynb").write_text(text)
    for folder in ("figures", "tables"):
        (results / folder).mkdir()
    (results / "figures" / "03_by_length.png").write_bytes(b"picture")
    (results / "tables" / "03_scores.csv").write_text(
        f"method,score,tokens\n{HOSTILE},99.123456,131072\n" + "hash,0.0000123456,4096\n" * 120
    )
    (results / "tables" / "03_empty.csv").write_text("")
    files = dict.fromkeys(("figures/03_by_length.png", "tables/03_scores.csv",
                           "tables/03_empty.csv"), "")  # fmt: skip
    states = {"03_quality": State("f", 60.0, "now", files), "04_silent": State("f", 1.0, "now")}
    return lambda claims, cautions=(): Outcome(
        load_profile("tiny"), states, list(claims), list(cautions)
    )


def test_a_report_begins_with_what_was_found_in_words(outcome):
    claims = [
        claim("HashAttention at 32x minus dense (points)", -1.5, main=True, paper="0.6"),
        claim("HashAttention minus quest (points)", -7.0, "not met"),
        claim("dense exact match", 99.0, "holds", goal=False),
    ]
    page = render_report(outcome(claims), MANIFEST)
    words = page[page.index("What was found") : page.index("<h2>Claims")]
    assert "1 of 1 claims hold, 1 of 2 goals met; about " in words
    assert "at 32x minus dense (points): -1.5, where &gt;= -3 was the goal, which is met" in words
    assert "; the paper has 0.6." in words
    assert "Goals that were not met: HashAttention minus quest (points) (-7, goal" in words
    assert 'class="alarm"' not in page and 'class="caution"' not in page


def test_failures_and_cuts_are_told_before_anything_else(outcome):
    claims = [
        claim("broken", 0.1, "VIOLATED", goal=False),
        claim("at 32x minus dense", 0.0, "not judged", reason="dense answers 0 of 8", main=True),
        claim("minus quest", 0.0, "not judged", reason="dense answers 0 of 8"),
    ]
    page = render_report(outcome(claims, [f"2 of 8 contexts were cut {HOSTILE}"]), MANIFEST)
    first, second = re.findall(r'<p class="alarm">(.*?)</p>', page)
    assert first == "Did not hold: broken: measured 0.1, must be &gt;= -3."
    assert second == "Not judged, because dense answers 0 of 8: at 32x minus dense; minus quest."
    assert page.index(second) < page.index("<h2>") < page.index('<p class="caution">2 of 8 cont')
    assert "which is not judged" not in page and 'class="not-judged">not judged' in page


def test_everything_is_escaped(outcome):
    page = render_report(
        outcome([claim(HOSTILE, paper=HOSTILE, reason=HOSTILE, verdict="not judged")], [HOSTILE]),
        MANIFEST,
    )
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5


def test_tables_are_rounded_captioned_and_fit_a_phone(outcome):
    page = render_report(outcome([claim("a")]), MANIFEST)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert 'data-name="score">99.12<' in page and 'data-name="tokens">131072<' in page
    assert 'data-name="score">1.235e-05<' in page
    assert "Scores, first 100 of 121 rows" in page and "By length" in page
    assert "03 · Quality &amp; density" in page and "<h2>04_silent</h2>" in page
    assert page.count("<td") == page.count("<td data-name=")  # each cell names its column
    narrow = page[page.index("@media (max-width: 700px)") :]
    assert re.search(r"tr, td, caption { display: block", narrow) and "attr(data-name)" in narrow
    assert "http" not in page


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("0.725898", "0.7259"),
        ("-12.3456", "-12.35"),
        ("131072", "131072"),
        ("52345.678", "52346"),
        ("1e-07", "1e-07"),
        ("0012.50 x", "0012.50 x"),
        ("hash_128", "hash_128"),
        ("3.11.2", "3.11.2"),
        ("nan", "nan"),
        ("", ""),
    ],
)
def test_decimal_numbers_are_shown_to_four_digits(cell, shown):
    assert short(cell) == shown


def test_captions_are_words():
    assert caption("02_recall_by_length") == "Recall by length"
    assert caption("dot") == "Dot"
    assert findings([], "data/embedded") == ["No notebook of this run makes a claim."]

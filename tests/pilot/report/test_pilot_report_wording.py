"""Every sentence is there in both languages and takes the same values."""

import re
from string import Formatter

import pytest

from hashattn.pilot.report.result import ReportError
from hashattn.pilot.report.wording import Words, english, japanese, sentences
from hashattn.pilot.settings import LANGUAGES

SHARE = 1 / 16
# the keys that a pilot emits, with values of their kind
EMITTED = {
    "quality_kept": {"budget": SHARE, "measure": "questions", "difference": -0.02, "low": -0.08,
                     "count": 40},
    "quality_open": {"budget": SHARE, "measure": "quotes", "difference": -0.02, "low": -0.08,
                     "count": 40, "more": 90},
    "quality_lost": {"budget": SHARE, "measure": "quotes", "difference": -0.2, "low": -0.3,
                     "count": 40},
    "fidelity_kept": {"budget": SHARE, "kl": 0.004, "agreement": 0.96, "documents": 8},
    "fidelity_open": {"budget": SHARE, "kl": 0.004, "kl_high": 0.1, "documents": 8, "more": 30},
    "fidelity_lost": {"budget": SHARE, "kl": 0.4, "agreement": 0.6, "documents": 8},
    "dense_cannot_answer": {"measure": "questions", "dense": 0.05, "guess": 0.05, "low": -0.1,
                            "count": 8},
    "text_not_predicted": {"dense": 6.1, "guess": 5.9, "count": 3},
    "nothing_to_judge": {"measure": "text", "count": 2, "least": 5},
    "not_judged": {"measure": "fidelity"},
    "preflight_no": {"ceiling": 1.04, "share": 0.04, "speedup": 1.1},
    "preflight_marginal": {"ceiling": 1.2, "share": 0.17, "speedup": 1.1},
    "preflight_worth": {"ceiling": 2.07, "share": 0.52, "speedup": 1.1},
    "contexts_cut": {"contexts": 3, "of": 12, "answers_lost": 1},
    "questions_withheld": {"count": 3},
    "questions_beyond": {"count": 30},
    "language_left_out": {"language": "ja", "count": 16, "dense": 0.0, "guess": 0.0},
    "model_is_embedded": {},
    "slower_here": {"speedup": 0.8, "context": 4096},
    "faster_here": {"speedup": 1.3, "context": 4096},
    "dense_here": {"dense_below": 5200, "context": 4096},
    "never_faster_here": {},
    "watch_drift": {},
    "watch_receipt": {"budget": SHARE},
    "watch_fallback": {},
    "retrain_when": {"mass": 0.88},
    "recheck_when": {},
}  # fmt: skip


def fields(template):
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def in_both(first, second):
    assert set(first) == set(second)
    differ = {key for key in first if fields(first[key]) != fields(second[key])}
    assert differ == set()


def test_both_languages_have_the_same_texts_with_the_same_values():
    in_both(english.TEXTS, japanese.TEXTS)
    in_both(english.SENTENCES, japanese.SENTENCES)


@pytest.mark.parametrize("of", ["capacity", "quantities", "documents"])
def test_so_have_the_other_parts_of_the_pilot(of):
    pytest.importorskip("hashattn.pilot." + of.replace("quantities", "capacity"))
    first, second = (sentences(of, language) for language in LANGUAGES)
    assert first
    in_both(first, second)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_emitted_key_becomes_a_sentence(language):
    words = Words(language)
    for key, values in EMITTED.items():
        text = words.sentence({"key": key, "values": values})
        assert text.endswith((".", "。")) and not re.search(r"[{}]|None|\d\.\d{5,}", text), text
    known = {key.removesuffix("_untold") for key in english.SENTENCES}
    assert known == set(EMITTED)


def test_sentences_round_for_people():
    words = Words("en")

    def say(key):
        return words.sentence({"key": key, "values": EMITTED[key]})

    assert say("quality_kept") == (
        "Reading 1 of 16 tokens, the quality of answers to your questions is kept: −2 points of "
        "100 against full attention, and a loss of more than 8 is unlikely (40 questions)."
    )
    assert "give 1.0 times" in say("preflight_no")
    assert "about 90 would give a firm answer" in say("quality_open")


def test_what_cannot_be_told_is_left_out():
    values = EMITTED["quality_open"] | {"more": None}
    text = Words("en").sentence({"key": "quality_open", "values": values})
    assert "firm" not in text and text.endswith("(40 sentences).")


def test_an_unknown_key_or_a_lacking_value_is_named():
    with pytest.raises(ReportError, match="no sentence of report for 'odd' in 'ja'"):
        Words("ja").sentence({"key": "odd", "values": {}})
    with pytest.raises(ReportError, match="'quality_kept' does not fit its values"):
        Words("en").sentence({"key": "quality_kept", "values": {}})
    with pytest.raises(ReportError, match="does not fit"):
        values = EMITTED["quality_kept"] | {"measure": "odd"}
        Words("en").sentence({"key": "quality_kept", "values": values})


def test_texts_in_values_cannot_hide_or_turn():
    text = Words("en")("changed.right", text="\u202eabc\0")
    assert text == "⟨U+202E⟩abc⟨U+0000⟩ (right)"


def test_japanese_uses_its_own_brackets_and_colons():
    for text in (japanese.TEXTS | japanese.SENTENCES).values():
        outside = re.sub(r"\{[^}]*\}", "", text)
        assert not re.search(r"[():,]", outside), text

"""The verdict, from rows written by hand: the floor decides first, then what was lost."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hashattn.pilot.judgement import judge
from hashattn.pilot.measurements import Measured, _told_from_guessing, packed_bits
from hashattn.pilot.settings import PilotSettings

SETTINGS = PilotSettings(budgets=(1 / 8, 1 / 16), texts=8)
LABELS = {None: "dense", 1 / 8: "8x", 1 / 16: "16x"}
WORTH = SimpleNamespace(verdict="worth", ceiling=3.0, share=0.6, speedup=2.2)
PLAN = SimpleNamespace(asked=(SimpleNamespace(lost=False),), divided=(), scored=(1, 2),
                       calibration=(1,), withheld=0, beyond=0)  # fmt: skip


def answers(scores, predictions=None):
    """Rows of answers: {density: scores}."""
    rows = []
    for density, own in scores.items():
        right = [f"answer {n:02d}" for n in range(len(own))]
        said = predictions or [r if s else "nothing" for r, s in zip(right, own, strict=True)]
        rows += [
            {"budget": LABELS[density], "score": float(score), "prediction": text,
             "density": density or 1.0}
            for score, text in zip(own, said, strict=True)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def fidelity(kl, dense_nll=1.0, count=8):
    """Rows of fidelity: {density: KL}."""
    rows = []
    for density, own in {None: 0.0, **kl}.items():
        rows += [
            {"budget": LABELS[density], "kl": own * (0.9 + 0.2 * n / count), "agreement": 1 - own,
             "nll": dense_nll + own / 2, "dense_nll": dense_nll, "positions": 65,
             "same_tokens": 16, "new_tokens": 32, "density": density or 1.0}
            for n in range(count)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def asked(count, known=True, contexts=10, language=lambda n: "en"):
    return tuple(
        SimpleNamespace(record=SimpleNamespace(language=language(n), dataset="questions_en"),
                        question=f"q{n}", lost=False,
                        answers=(f"answer {n:02d}",) if known else (),
                        context=SimpleNamespace(text=f"context {n % contexts}"))
        for n in range(count)
    )  # fmt: skip


def measured(dense, sparse, guess, kl=0.01, ours=None, said=None, **how):
    """What was asked (40 questions unless `ours`): scores of dense, of every budget, of guesses."""
    ours = asked(len(dense)) if ours is None else ours
    own = dict.fromkeys((1 / 8, 1 / 16), sparse) if isinstance(sparse, list) else sparse
    closeness = kl if isinstance(kl, dict) else {1 / 8: kl, 1 / 16: kl}
    texts = how.get("count", 8)
    alone = answers({None: dense}, said)
    floor, left_out, numbers = _told_from_guessing(ours, alone, answers({None: guess}))
    kept = {d: [scores[n] for n in numbers] for d, scores in {None: dense, **own}.items()}
    return Measured(
        ours, floor, left_out, tuple(ours[n] for n in numbers),
        answers(kept, said) if numbers else pd.DataFrame(), fidelity(closeness, **how), LABELS,
        (4.0,) * texts, (200,) * texts,
    )  # fmt: skip


GOOD, BAD, NONE = [1] * 30 + [0] * 10, [1] * 8 + [0] * 32, [0] * 40


def keys(judgement):
    return [reason.key for reason in judgement.reasons]


def test_kept_everywhere_goes_at_the_smallest_budget():
    found = judge(measured(GOOD, GOOD, NONE), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("go", 1 / 16)
    assert keys(found) == ["quality_kept", "fidelity_kept", "preflight_worth"]
    assert found.floors["questions"].clear and found.floors["questions"].difference == 0.75
    best = found.quality[-1].questions
    assert (best.difference, best.low, best.high, best.same, best.more) == (0, 0, 0, 1, None)


def test_all_questions_on_one_context_have_an_interval_too():
    """Whole contexts are drawn where there are five; one alone would give no width at all."""
    ours = asked(40, contexts=1)
    found = judge(measured(GOOD, [1] * 28 + [0] * 12, [1] * 28 + [0] * 12, ours=ours), PLAN,
                  SETTINGS, WORTH)  # fmt: skip
    floor = found.floors["questions"]
    assert floor.low < floor.difference < floor.high and not floor.clear
    part = judge(measured(GOOD, [1] * 28 + [0] * 12, NONE, ours=ours), PLAN, SETTINGS, WORTH)
    assert part.quality[0].questions.low < -0.05 < 0 == part.quality[0].questions.high


def test_a_budget_counts_only_if_larger_ones_do():
    """1/8 loses, 1/16 keeps by chance: no go; 1/8 is open, 1/16 kept: fallback at most."""
    found = judge(measured(GOOD, {1 / 8: BAD, 1 / 16: GOOD}, NONE), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("no_go", None)
    wavering = [1] * 28 + [0, 0] + [1, 1] + [0] * 8
    found = judge(measured(GOOD, {1 / 8: wavering, 1 / 16: GOOD}, NONE), PLAN, SETTINGS, WORTH)
    assert found.verdict == "go_with_fallback"


def test_a_mean_that_loses_more_than_tolerated_is_no_fallback():
    """10 points are lost, give or take 10: open, but not to be gone for."""
    worse = [1] * 24 + [0] * 6 + [1] * 2 + [0] * 8
    found = judge(measured(GOOD, worse, NONE), PLAN, SETTINGS, WORTH)
    assert found.quality[0].questions.verdict == "open"
    assert (found.verdict, found.budget) == ("no_go", None)


def test_what_was_not_asked_and_how_fast_it_was_are_remarks():
    plan = SimpleNamespace(**(vars(PLAN) | {"withheld": 3, "beyond": 20}))
    times = {"context": 1800,
             "budgets": [{"budget": 1 / 8, "speedup": 0.8, "dense_below": 1500},
                         {"budget": 1 / 16, "speedup": 1.5, "dense_below": 900}]}  # fmt: skip
    found = judge(measured(GOOD, GOOD, NONE), plan, SETTINGS, WORTH, times)
    remarks = {reason.key: reason.values for reason in found.reasons}
    assert remarks["questions_withheld"] == {"count": 3}
    assert remarks["questions_beyond"] == {"count": 20}
    assert remarks["faster_here"] == {"speedup": 1.5, "context": 1800}


@pytest.mark.parametrize(
    ("below", "speedup", "key", "values"),
    [
        (900, 0.99, "slower_here", {"speedup": 0.99, "context": 1800}),
        (1800, 1.01, "faster_here", {"speedup": 1.01, "context": 1800}),
        (1801, 0.99, "dense_here", {"dense_below": 1801, "context": 1800}),
        (1801, 1.01, "dense_here", {"dense_below": 1801, "context": 1800}),  # both were dense
        (None, 0.99, "never_faster_here", {}),
    ],
)
def test_a_step_that_stays_dense_is_called_neither_faster_nor_slower(below, speedup, key, values):
    row = {"budget": 1 / 16, "speedup": speedup, "dense_below": below}
    times = {"context": 1800, "budgets": [row]}
    found = judge(measured(GOOD, GOOD, NONE), PLAN, SETTINGS, WORTH, times)
    remarks = {reason.key: reason.values for reason in found.reasons}
    here = {"slower_here", "faster_here", "dense_here", "never_faster_here"}
    assert here & set(remarks) == {key} and remarks[key] == values


def test_the_smallest_budget_that_keeps_quality_is_taken():
    found = judge(measured(GOOD, {1 / 8: GOOD, 1 / 16: BAD}, NONE), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("go", 1 / 8)
    assert found.quality[1].questions.verdict == "lost"


def test_lost_everywhere_is_no_go():
    found = judge(measured(GOOD, BAD, NONE), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("no_go", None)
    assert keys(found)[0] == "quality_lost"
    assert found.reasons[0].values["difference"] == pytest.approx(-0.55)


def test_lost_fidelity_is_no_go_whatever_the_answers():
    found = judge(measured(GOOD, GOOD, NONE, kl=0.5), PLAN, SETTINGS, WORTH)
    assert found.verdict == "no_go" and "fidelity_lost" in keys(found)


def test_what_is_open_goes_with_fallback_and_says_how_many_more():
    wavering = [1] * 28 + [0, 0] + [1, 1] + [0] * 8  # two lost, two won: in the mean nothing
    found = judge(measured(GOOD, wavering, NONE), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("go_with_fallback", 1 / 8)
    part = found.quality[0].questions
    assert part.verdict == "open" and part.low < -0.05 < 0 == part.difference
    # the interval's half shrinks as the root of their number, to 5 points
    half = max(-part.low, part.high)
    assert part.more == int(np.ceil(40 * (half / 0.05) ** 2)) > 40


def test_dense_that_cannot_be_told_from_guessing_decides():
    found = judge(measured(BAD, BAD, BAD), PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("cannot_be_judged", None)
    assert keys(found)[0] == "dense_cannot_answer"
    assert not found.floors["questions"].clear
    parts = [quality.questions for quality in found.quality]
    assert {(part.verdict, part.more, part.sparse) for part in parts} == {
        ("cannot_be_judged", None, None)
    }
    # what rests on the text alone is still judged
    assert {quality.fidelity.verdict for quality in found.quality} == {"kept"}


def test_a_model_that_answers_nothing_is_not_called_equal():
    found = judge(measured(NONE, NONE, NONE), PLAN, SETTINGS, WORTH)
    assert found.verdict == "cannot_be_judged" and "quality_kept" not in keys(found)


def test_a_language_that_the_model_cannot_do_is_left_out_and_said():
    """20 of 40 questions in Japanese, all answered wrongly: they would hide half of every loss."""
    dense, sparse = [1, 1, 1, 0, 1] * 4 + [0] * 20, [1, 0, 0, 0, 1] * 4 + [0] * 20
    ours = asked(40, language=lambda n: "en" if n < 20 else "ja")
    found = judge(measured(dense, sparse, NONE, ours=ours), PLAN, SETTINGS, WORTH)
    part, floor = found.quality[0].questions, found.floors["questions"]
    assert (part.count, part.dense, part.sparse, floor.count) == (20, 0.8, 0.4, 20)
    (left,) = (reason for reason in found.reasons if reason.key == "language_left_out")
    assert left.values == {"language": "ja", "count": 20, "dense": 0.0, "guess": 0.0}


def test_answers_that_fit_every_question_are_guesses():
    """All say yes, and yes is right half of the time."""
    yes = tuple(
        SimpleNamespace(**(vars(each) | {"answers": ("yes",) if n % 2 == 0 else ("no",)}))
        for n, each in enumerate(asked(40))
    )
    rows = measured([1, 0] * 20, [1, 0] * 20, NONE, ours=yes, said=["yes"] * 40)
    found = judge(rows, PLAN, SETTINGS, WORTH)
    assert found.verdict == "cannot_be_judged"
    assert found.floors["questions"].guess == pytest.approx(0.5, abs=0.02)


def test_text_that_a_compressor_predicts_as_well_is_not_judged():
    # 64 predicted tokens of 200 bytes at 12 nats each are 5.5 bits a byte; the compressor needs 4
    found = judge(measured(GOOD, GOOD, NONE, dense_nll=12.0), PLAN, SETTINGS, WORTH)
    assert found.verdict == "cannot_be_judged" and keys(found)[0] == "text_not_predicted"
    assert found.floors["text"].dense == pytest.approx(12 * 64 / np.log(2) / 200)
    assert {quality.fidelity.verdict for quality in found.quality} == {"cannot_be_judged"}


def test_too_few_samples_decide_nothing():
    found = judge(measured(GOOD, GOOD, NONE, count=4), PLAN, SETTINGS, WORTH)
    assert found.verdict == "cannot_be_judged" and keys(found)[0] == "nothing_to_judge"
    few = judge(measured([1] * 4, [1] * 4, [0] * 4), PLAN, SETTINGS, WORTH)
    assert few.verdict == "cannot_be_judged" and not few.floors["questions"].clear


def test_nothing_to_gain_is_no_go_first():
    nothing = SimpleNamespace(verdict="no", ceiling=1.02, share=0.02, speedup=1.01)
    found = judge(measured(GOOD, GOOD, NONE), PLAN, SETTINGS, nothing)
    assert (found.verdict, keys(found)[0]) == ("no_go", "preflight_no")
    assert found.reasons[0].values == {"ceiling": 1.02, "share": 0.02, "speedup": 1.01}


def test_the_embedded_model_proves_nothing():
    found = judge(measured(GOOD, GOOD, NONE), PLAN, SETTINGS, WORTH, embedded=True)
    assert found.verdict == "cannot_be_judged" and keys(found)[0] == "model_is_embedded"


def test_questions_without_answers_leave_the_verdict_to_fidelity():
    rows = measured(GOOD, GOOD, NONE, ours=asked(40, known=False))
    found = judge(rows, PLAN, SETTINGS, WORTH)
    assert (found.verdict, found.floors["questions"]) == ("go", None)
    assert keys(found) == ["fidelity_kept", "preflight_worth"]
    part = found.quality[0].questions
    assert (part.dense, part.verdict, part.same, part.count) == (None, "cannot_be_judged", 1.0, 40)


def test_without_questions_fidelity_alone_decides():
    rows = Measured((), None, {}, (), pd.DataFrame(), fidelity({1 / 8: 0.01, 1 / 16: 0.2}),
                    LABELS, (4.0,) * 8, (200,) * 8)  # fmt: skip
    found = judge(rows, SimpleNamespace(**(vars(PLAN) | {"asked": ()})), SETTINGS, WORTH)
    assert (found.verdict, found.budget) == ("go", 1 / 8)
    assert found.quality[1].fidelity.verdict == "lost" and found.quality[0].questions is None


def test_documents_read_in_parts_are_a_reason():
    plan = SimpleNamespace(
        **(
            vars(PLAN)
            | {
                "divided": ("a.txt",),
                "asked": (SimpleNamespace(lost=True), SimpleNamespace(lost=False)),
            }
        )
    )
    found = judge(measured(GOOD, GOOD, NONE), plan, SETTINGS, WORTH)
    assert found.reasons[-1].key == "contexts_cut"
    assert found.reasons[-1].values == {"contexts": 1, "of": 3, "answers_lost": 1}


def test_a_judgement_is_plain_json():
    found = judge(measured(GOOD, BAD, NONE), PLAN, SETTINGS, WORTH)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_bits_of_a_file_compressor():
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, 256, n, dtype=np.uint8).tobytes() for n in (4000, 1000))
    assert packed_bits(before, after) == pytest.approx(8, abs=0.1)  # nothing to find
    assert packed_bits(before, before[:1000]) < 0.5  # said before

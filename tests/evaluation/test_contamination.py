"""What the hashes saw of a benchmark: by sample, by context, and where nobody wrote it down."""

from dataclasses import replace

import pandas as pd
import pytest

from hashattn.evaluation.benchmarks.longbench import fine_tuning_split
from hashattn.evaluation.contamination import (
    CONTEXTS,
    COUNT_ONLY,
    NONE,
    OTHERS,
    SAMPLES,
    UNKNOWN,
    benchmarks,
    contamination,
)
from hashattn.evaluation.identity import context_sha256, record_sha256
from hashattn.evaluation.records import Record
from hashattn.hashing import HashConfig, HashWeights


def records(dataset, count, contexts=None):
    """`count` questions, about as many contexts or about `contexts` of them in turn."""
    return [
        Record(f"question {i}", f"{dataset} {i % (contexts or count)}", ("yes",), dataset=dataset)
        for i in range(count)
    ]


def card(**data):
    return {"data": {"note": "texts", **data}}


def found(weights, scored):
    return contamination(weights, scored)["found"].to_dict()


def test_a_card_without_the_field_is_unknown_and_one_that_says_nothing_trained_is_none():
    scored = records("qasper", 3)
    assert found(card(), scored) == found({}, scored) == {"qasper": UNKNOWN}
    assert found(card(benchmarks={}), scored) == {"qasper": NONE}
    table = contamination(card(), scored)
    assert table.loc["qasper", "scored"] == 3
    assert table[["trained", "same_samples", "same_contexts"]].isna().all(axis=None)
    assert contamination(card(benchmarks={}), scored).loc["qasper", "trained"] == 0


def test_the_papers_fine_tuned_split_shows_what_was_trained_and_scored():
    """The last 25 of 200 train; of multifieldqa_en's 150 none, and musique shares contexts."""
    whole = [*records("qasper", 200), *records("musique", 200, contexts=180)]
    split = fine_tuning_split([*whole, *records("multifieldqa_en", 150)])
    table = contamination(card(benchmarks=benchmarks(split.train)), split.score)
    assert table["scored"].to_dict() == {"qasper": 175, "musique": 175, "multifieldqa_en": 150}
    assert table["trained"].to_dict() == {"qasper": 25, "musique": 25, "multifieldqa_en": 0}
    assert (table["same_samples"] == 0).all()
    assert table["found"].to_dict() == {
        "qasper": OTHERS, "musique": CONTEXTS, "multifieldqa_en": NONE,
    }  # fmt: skip
    shared = [r for r in split.shared_contexts if r.dataset == "musique"]
    assert table.loc["musique", "same_contexts"] == len(shared) == 20
    assert len(split.shared_contexts) == 20


def test_scored_samples_that_trained_are_found():
    scored = records("qasper", 10)
    table = contamination(card(benchmarks=benchmarks(scored[:3])), scored)
    assert table.loc["qasper", ["trained", "same_samples", "same_contexts"]].tolist() == [3, 3, 3]
    assert table.loc["qasper", "found"] == SAMPLES


def test_longbench_e_shares_its_contexts_with_longbench():
    trained = records("hotpotqa", 5)
    scored = [replace(record, dataset="hotpotqa_e") for record in trained[3:]]
    table = contamination(card(benchmarks=benchmarks(trained)), scored)
    assert table.loc["hotpotqa_e", ["trained", "same_samples", "same_contexts"]].tolist() == [
        5,
        0,
        2,
    ]
    assert table.loc["hotpotqa_e", "found"] == CONTEXTS
    table = contamination(card(benchmarks=benchmarks(scored)), trained)
    assert table.loc["hotpotqa", ["trained", "same_samples", "same_contexts"]].tolist() == [2, 0, 2]


def test_results_of_evaluate_are_judged_as_the_records_are():
    scored = records("qasper", 4, contexts=2)
    frame = pd.DataFrame(
        {"dataset": r.dataset, "sample": record_sha256(r), "context": context_sha256(r)}
        for r in scored * 2  # two methods
    )
    trained = card(benchmarks=benchmarks(scored[:1]))
    expected = contamination(trained, scored)
    pd.testing.assert_frame_equal(contamination(trained, frame), expected)
    assert expected.loc["qasper", ["scored", "same_samples", "same_contexts"]].tolist() == [4, 1, 2]


def test_counts_and_names_alone_say_less():
    counted = card(benchmarks={"qasper": 25, "trec": 0})
    assert found(counted, records("qasper", 3)) == {"qasper": COUNT_ONLY}
    assert found(counted, ["qasper", "trec", "lcc"]) == {
        "qasper": COUNT_ONLY, "trec": NONE, "lcc": NONE,
    }  # fmt: skip
    table = contamination(counted, ["qasper"])
    assert table.loc["qasper", "trained"] == 25 and pd.isna(table.loc["qasper", "same_samples"])
    listed = card(benchmarks=benchmarks(records("qasper", 2)))
    assert found(listed, ["qasper"]) == {"qasper": COUNT_ONLY}


def test_hash_weights_bring_their_card():
    config = HashConfig((0,), query_heads=4, kv_heads=2, head_dim=32)
    random = HashWeights.random(config, 0)
    assert found(random, ["qasper"]) == {"qasper": UNKNOWN}
    told = HashWeights(config, random.maps, card(benchmarks={"qasper": 2}))
    assert found(told, ["qasper"]) == {"qasper": COUNT_ONLY}


@pytest.mark.parametrize("entry", [-1, True, "25", ["a"], {"samples": ["a"]},
                                   {"samples": [1], "contexts": []}])  # fmt: skip
def test_a_damaged_card_is_refused(entry):
    with pytest.raises(
        ValueError, match=r"benchmarks\['qasper'\] = .* must be a number of samples"
    ):
        contamination(card(benchmarks={"qasper": entry}), ["qasper"])

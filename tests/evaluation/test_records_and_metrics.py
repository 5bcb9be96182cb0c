"""LongBench records on disk, the scores of predictions, the bootstrap."""

import json

import numpy as np
import pytest

from hashattn.evaluation.metrics import METRICS, exact_match, qa_f1
from hashattn.evaluation.records import (
    Record,
    RecordError,
    group_by_context,
    load_records,
    record_from_dict,
    save_records,
)
from hashattn.evaluation.statistics import paired_bootstrap

RECORD = {
    "input": "Who?", "context": "A met B.\nC left.", "answers": ["A", "B é"], "length": 5,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "x1",
}  # fmt: skip


def test_records_survive_the_disk_in_longbench_form(tmp_path):
    labelled = RECORD | {"all_classes": ["x", "y"], "_id": "x2"}
    path = tmp_path / "sub" / "set.jsonl"
    save_records([record_from_dict(RECORD), record_from_dict(labelled)], path)
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [RECORD, labelled]
    assert [r.to_dict() for r in load_records(path)] == [RECORD, labelled]
    assert len(load_records(path, limit=1)) == 1
    assert list(path.parent.iterdir()) == [path]


def test_broken_files_are_refused_with_their_line(tmp_path):
    path = tmp_path / "set.jsonl"
    with pytest.raises(RecordError, match="no records at"):
        load_records(path)
    path.write_text(json.dumps(RECORD) + "\n{broken\n")
    with pytest.raises(RecordError, match="set.jsonl:2 is not JSON"):
        load_records(path)
    path.write_text('{"input": "a", "context": "b"}\n')
    with pytest.raises(RecordError, match=r"set.jsonl:1: record lacks \['answers'\]"):
        load_records(path)
    path.write_text(json.dumps(RECORD | {"answers": "A"}) + "\n")
    with pytest.raises(RecordError, match="answers = 'A': must be a list"):
        load_records(path)
    path.write_text("[1]\n")
    with pytest.raises(RecordError, match="set.jsonl:1"):
        load_records(path)
    path.write_text("\n")
    with pytest.raises(RecordError, match="holds no records"):
        load_records(path)


def test_extra_fields_are_ignored_and_answers_needed():
    assert record_from_dict(RECORD | {"note": 1}) == record_from_dict(RECORD)
    with pytest.raises(RecordError, match="answers = .*at least one text"):
        record_from_dict(RECORD | {"answers": []})


def test_groups_gather_contexts_in_first_order():
    records = [Record(q, c, ("a",)) for q, c in ("1x", "2y", "3x", "4z", "5y")]
    asked = [[record.input for record in group] for group in group_by_context(records)]
    assert asked == [["1", "3"], ["2", "5"], ["4"]]


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        (" 4821\nnext", ["4821"], 1.0),
        ("\n4821", ["4821"], 1.0),
        ("4821.", ["4821"], 0.0),
        ("b", ["a", "b "], 1.0),
        ("B", ["b"], 0.0),
        ("", ["b"], 0.0),
    ],
)
def test_exact_match_reads_the_first_line(prediction, answers, score):
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The cat, sat!", ["a cat sat"], 1.0),
        ("cat dog", ["cat"], 2 / 3),
        ("cat cat dog", ["cat cat bird"], 2 / 3),
        ("cow", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("x y", ["z", "y"], 2 / 3),
    ],
)
def test_qa_f1_is_longbenchs(prediction, answers, score):
    assert qa_f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_refuse_a_bare_string_and_no_answers(metric):
    for answers in ("cat", []):
        with pytest.raises(ValueError, match="non-empty list"):
            metric("cat", answers, ["cat"])


def test_bootstrap_agrees_with_the_normal_interval():
    generator = np.random.default_rng(0)
    b = generator.normal(size=400)
    a = b + 0.3 + generator.normal(scale=0.5, size=400)
    found = paired_bootstrap(a, b)
    error = 1.96 * (a - b).std() / 20
    assert found.difference == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(found.difference - error, abs=0.015)
    assert found.high == pytest.approx(found.difference + error, abs=0.015)
    assert found.verdict == "above"
    assert paired_bootstrap(b, a).verdict == "below"
    assert paired_bootstrap(a, b) == found and paired_bootstrap(a, b, seed=1) != found
    assert found.scaled(100).low == pytest.approx(100 * found.low)


def test_bootstrap_of_equal_scores_is_zero_and_not_distinguishable():
    found = paired_bootstrap([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert found.verdict == "not distinguishable"


def test_bootstrap_draws_whole_contexts():
    """Ten copies of a context's samples carry no more information than one."""
    generator = np.random.default_rng(1)
    deltas = generator.normal(size=30)
    copies = np.repeat(deltas, 10)
    groups = np.repeat(np.arange(30), 10).tolist()
    zeros = np.zeros(300)
    alone = paired_bootstrap(deltas, np.zeros(30))
    grouped = paired_bootstrap(copies, zeros, groups=groups)
    ignored = paired_bootstrap(copies, zeros)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert ignored.high - ignored.low < 0.5 * (grouped.high - grouped.low)


def test_statistics_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="2 and 1"):
        paired_bootstrap([1, 2], [1])
    with pytest.raises(ValueError, match="confidence"):
        paired_bootstrap([1], [1], confidence=1.0)
    with pytest.raises(ValueError, match="groups"):
        paired_bootstrap([1], [1], groups=[1, 2])

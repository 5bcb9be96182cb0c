"""Questions about installed packages: the answer is in the context, and nothing is too long."""

from dataclasses import replace
from importlib.metadata import version

import pytest

from hashattn.evaluation.benchmarks import packages
from hashattn.evaluation.methods import Method
from hashattn.evaluation.runner import evaluate
from hashattn.reproduce.access import load_model
from hashattn.reproduce.profiles import load_profile

LENGTH = 2048
TASKS = ("version", "licence", "summary")


@pytest.fixture(scope="module")
def loaded():
    return load_model(load_profile("tiny"))


def test_every_answer_follows_its_question_in_the_context(loaded):
    records = packages.questions(loaded[1], LENGTH, 4, TASKS)
    assert [record.dataset for record in records] == 4 * list(TASKS)
    for record in records:
        assert f"{record.input} {record.answers[0]}\n" in record.context
        assert record.context.count(record.input) == 1
        tokens = loaded[1](f"{record.context}\n{record.input}")["input_ids"]
        assert LENGTH / 2 < len(tokens) < LENGTH
    assert len({record.context for record in records}) == 4
    assert len({record._id for record in records}) == 12


def test_answers_are_what_is_installed():
    known = {package.name: package for package in packages.packages()}
    assert all(package.version == version(name) for name, package in known.items())
    assert list(known) == sorted(known) and len(known) > 20


def test_records_follow_the_seed(loaded):
    one, same, other = (packages.questions(loaded[1], LENGTH, 2, TASKS, s) for s in (1, 1, 2))
    assert one == same and one != other


def test_too_short_contexts_and_too_many_samples_are_refused(loaded):
    with pytest.raises(ValueError, match="length = 150: must be more tokens: .* two packages"):
        packages.questions(loaded[1], 150, 1, TASKS)
    with pytest.raises(ValueError, match="samples = 99999: must be at most"):
        packages.questions(loaded[1], LENGTH, 99999, TASKS)


def test_a_profile_asks_them_in_both_setups(loaded, tmp_path):
    profile = replace(load_profile("tiny"), benchmark="packages", tasks=TASKS)
    benchmark = packages.BENCHMARK
    records = benchmark.records(profile, loaded[1], LENGTH, 1, None)
    frame = evaluate(*loaded, records, [Method("dense")], benchmark.protocol(profile, LENGTH, None),
                     tmp_path / "rows.jsonl", progress=False)  # fmt: skip
    assert set(frame.dataset) == set(TASKS) and set(frame.setup) == {"A", "B"}
    protocol = benchmark.protocol(profile, LENGTH, None)
    assert {task: protocol.of(task).metric for task in TASKS} == {
        "version": "exact_match", "licence": "exact_match", "summary": "qa_f1",
    }  # fmt: skip

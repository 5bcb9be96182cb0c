"""Fine-tuning on a task: what trains, what is scored, and the whole experiment in small."""

from dataclasses import replace

import pytest

from hashattn.evaluation.benchmarks.corpus import paragraphs, split_of
from hashattn.evaluation.records import Record, save_records
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import finetuning
from hashattn.reproduce.experiments.finetuning import CONTROL, GENERIC, TUNED
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile


@pytest.fixture(scope="module")
def profile():
    tiny = load_profile("tiny")
    return replace(tiny, training=replace(tiny.training, steps=8, sequences=2, length=1024))


@pytest.fixture(scope="module")
def loaded(profile):
    return load_model(profile)


def test_generated_samples_share_no_line_with_what_is_scored(profile, loaded):
    made = finetuning.samples(profile, loaded[1], 1024, "needle")
    assert len(made.train) == 8 and len(made.scored) == profile.samples_per_task == 2
    assert {r.dataset for r in (*made.train, *made.scored)} == {"needle"}
    assert {r.dataset for r in made.others} == set(profile.tasks) - {"needle"}
    trained = {line for r in made.train for line in r.context.splitlines()}
    held_out = {line for r in (*made.scored, *made.others) for line in r.context.splitlines()}
    assert {split_of(line) for line in trained} == {"train"}
    assert {split_of(line) for line in held_out} == {"eval"}


def test_a_profiles_own_records_are_split_as_the_paper_does(profile, loaded, tmp_path):
    made = [Record(f"q{i}", f"context {i % 150}", (f"a{i}",)) for i in range(205)]
    own = replace(profile, data=str(tmp_path), tasks=("large", "small"), samples_per_task=60)
    for task, count in (("large", 205), ("small", 150)):
        part = [replace(record, dataset=task) for record in made[:count]]
        save_records(part, tmp_path / f"{task}.jsonl")
    found = finetuning.samples(own, loaded[1], 1024, "large")
    assert [r.input for r in found.train] == [f"q{i}" for i in range(180, 205)]
    taken = set(range(30, 55))  # contexts of the last 25
    scored = [i for i in range(175) if i % 150 not in taken][:60]
    assert [r.input for r in found.scored] == [f"q{i}" for i in scored]
    assert {r.dataset for r in found.others} == {"small"} and len(found.others) == 8
    found = finetuning.samples(own, loaded[1], 1024, "small")
    assert [r.input for r in found.train] == [f"q{i}" for i in range(132, 150)]
    assert [r.input for r in found.scored] == [f"q{i}" for i in range(60)]
    assert finetuning.samples(own, loaded[1], 1024).task == "large"
    one = replace(own, tasks=("few",))
    save_records([replace(made[0], input=f"q{i}") for i in range(9)], tmp_path / "few.jsonl")
    with pytest.raises(ValueError, match="'few' has 9 records, too few"):
        finetuning.samples(one, loaded[1], 1024, "few")  # all of one context
    assert finetuning.samples(one, loaded[1], 1024).task == "multihop"  # generated in its place
    either = replace(own, tasks=("few", "small"))
    assert finetuning.samples(either, loaded[1], 1024).task == "small"
    with pytest.raises(ValueError, match=r"must be one of large, small"):
        finetuning.samples(own, loaded[1], 1024, "needle")


def test_text_is_of_its_split_without_facts_and_of_three_lengths(loaded):
    tokenizer = loaded[1]
    made = finetuning.text_sequences(tokenizer, 1024, 4, split="train")
    assert [len(ids) for ids, _ in made] == [1024, 512, 1024, 256]
    assert [len(rows) for _, rows in made] == [32, 16, 32, 8]
    for ids, _ in made:
        lines = tokenizer.decode(ids, skip_special_tokens=True).splitlines()[:-1]
        assert lines and {line.strip() for line in lines} <= {
            line.strip() for line in paragraphs("train")
        }
    again = finetuning.text_sequences(tokenizer, 1024, 4, seed=1)
    assert not (made[0][0] == again[0][0]).all()


def test_the_experiment_from_text_to_answers(profile, loaded, results):
    made = finetuning.samples(profile, loaded[1], 2048, "needle")
    weights = finetuning.train(profile, *loaded, made, 2048, progress=False)
    assert list(weights) == [GENERIC, CONTROL, TUNED]
    assert len({part.sha256 for part in weights.values()}) == 3
    generic, control, tuned = (part.card for part in weights.values())
    assert "started_from" not in generic
    for card in (control, tuned):
        assert card["started_from"]["sha256"] == weights[GENERIC].sha256
        assert card["recipe"]["steps"] == 8 and card["recipe"]["learning_rate"] == 1e-3
    assert control["data"]["train"] == generic["data"]["train"] != tuned["data"]["train"]
    assert tuned["data"]["note"].startswith("8 samples of needle")
    table = finetuning.selection(profile, *loaded, weights, made, 2048)
    assert set(table.index.get_level_values("asked")) == {"needle", "other tasks", "text"}
    assert (table["recall@4"] <= 1).all() and (table["output_error"] > 0).all()
    oracle = table.xs("oracle", level="method")["output_error"]
    assert all((oracle < table.xs(name, level="method")["output_error"]).all() for name in weights)
    scores = finetuning.answers(profile, *loaded, weights, made, 2048, progress=False)
    assert list(scores.index) == ["dense", "oracle", *weights]
    assert list(scores.columns) == ["dense", "32x"]  # 64x of 2,048 tokens leaves no heavy token
    assert scores.loc["dense", "dense"] >= 50
    assert not scores["32x"].drop("dense").isna().any()
    claims = Claims("01_hash_training", results)
    finetuning.fine_tuning_claims(claims, table, scores, "needle")
    made_of = {claim.claim: claim.ours for claim in claims.records}
    mass = table["heavy_mass"]
    assert list(made_of.values()) == pytest.approx([
        mass["needle", TUNED] / mass["needle", GENERIC],
        mass["needle", TUNED] / mass["needle", CONTROL],
        mass["other tasks", TUNED] / mass["other tasks", GENERIC],
        mass["text", TUNED] / mass["text", GENERIC],
        scores.loc[TUNED, "32x"] - scores.loc["dense", "dense"],
    ])  # fmt: skip
    assert "not judged" not in {claim.verdict for claim in claims.records}
    unanswered = 0 * scores
    unanswered.attrs = {"cut": "3 of 4 contexts were cut, 1 answers lost"}
    claims = Claims("01_hash_training", results)
    finetuning.fine_tuning_claims(claims, table, unanswered, "needle")
    assert [c.verdict for c in claims.records if c.verdict == "not judged"] == ["not judged"]
    assert claims.records[-1].reason.startswith("dense attention scores 0 points")
    assert claims.cautions == ["samples of needle: 3 of 4 contexts were cut, 1 answers lost"]


def test_ruler_draws_other_needles_to_train_on(loaded):
    profile = replace(
        load_profile("tiny"), benchmark="ruler", tasks=("niah_single_1", "niah_multikey_1"),
        lengths=(2048,), samples_per_task=2,
    )  # fmt: skip
    found = finetuning.samples(profile, loaded[1], 2048)
    assert found.task == "niah_single_1" and len(found.scored) == 2 and len(found.train) == 16
    assert {r.dataset for r in found.others} == {"niah_multikey_1"}
    answers = [{a for r in part for a in r.answers} for part in (found.train, found.scored)]
    assert not answers[0] & answers[1]
    assert max(r.length for r in found.train) <= 1024 < min(r.length for r in found.scored)


def test_packages_that_are_scored_are_not_trained_on(loaded):
    profile = replace(load_profile("tiny"), benchmark="packages", tasks=("version", "summary"),
                      lengths=(2048,), samples_per_task=30)  # fmt: skip
    found = finetuning.samples(profile, loaded[1], 2048)
    asked = [{r.input for r in part} for part in (found.train, found.scored)]
    assert len(asked[1]) == 30 and asked[0] and not asked[0] & asked[1]
    assert len(found.train) < 16  # of as many drawn
    assert {r.dataset for r in found.others} == {"summary"}


def test_texts_without_answers_are_tuned_on_generated_tasks(loaded, capsys):
    profile = replace(load_profile("tiny"), benchmark="texts", tasks=("code",))
    found = finetuning.samples(profile, loaded[1], 1024)
    assert found.task == "multihop" and found.protocol.metric == "exact_match"
    assert "no task of benchmark 'texts' has enough records" in capsys.readouterr().err

"""Counts asked for are counts given, and what was given before stays as it was."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.generated import generated_records
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.experiments import finetuning
from hashattn.reproduce.profiles import load_profile


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(repository() / "data" / "embedded", local_files_only=True)


@pytest.fixture(scope="module")
def tiny():
    return load_profile("tiny")


def short(profile, length=1024):
    return replace(profile, training=replace(profile.training, length=length))


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("samples", range(1, 12))
def test_every_task_gets_as_many_records_as_asked_for(tiny, tokenizer, samples):
    made = generated_records(tokenizer, 512, samples, seed=tiny.seed)
    assert Counter(r.dataset for r in made) == dict.fromkeys(experiments.TASKS, samples)
    assert len({r._id for r in made}) == len(made)
    more = generated_records(tokenizer, 512, samples + 1, seed=tiny.seed)
    assert [r for r in more if r in made] == made  # the first of more are those of fewer
    few = generated_records(tokenizer, 512, samples, seed=tiny.seed, tasks=("needle",))
    assert len(few) == samples


@pytest.mark.parametrize("samples", [0, -1])
def test_no_records_cannot_be_asked_for(tiny, tokenizer, samples):
    with pytest.raises(ValueError, match="contexts = .*: must be an integer of at least 1"):
        generated_records(tokenizer, 512, samples, seed=tiny.seed)


@pytest.mark.parametrize("count", range(1, 12))
def test_as_many_sequences_train_as_asked_for(tiny, tokenizer, count):
    made = experiments.training_sequences(short(tiny, 2048), tokenizer, count, tasks=("code",))
    longest = Counter(1 if len(ids) > 1024 else 2 if len(ids) > 512 else 4 for ids, _ in made)
    assert len(made) == count and max(longest.values()) == longest[1] >= count / 2 - 0.5
    assert count < 3 or set(longest) == {1, 2, 4}


@pytest.mark.parametrize(
    ("length", "samples", "count", "before"),
    [
        (512, 2, 12, "549470669859142e"),
        (1024, 16, 96, "7be0ca4331f560f5"),
        (2048, 6, 36, "fbe065bbe7661c9c"),
    ],
)
def test_records_of_whole_contexts_are_those_of_before(tiny, tokenizer, length, samples, count,
                                                       before):  # fmt: skip
    made = generated_records(tokenizer, length, samples, seed=tiny.seed, tasks=tiny.tasks)
    assert (len(made), digest([r.to_dict() for r in made])) == (count, before)


@pytest.mark.parametrize(
    ("count", "split", "before"),
    [
        (4, "train", "5fa3beb529da6ba8"),
        (24, "train", "9e46c1ce33d34b7d"),
        (32, "train", "ab67e369597fce03"),
        (3, "validation", "ef78db4933f00fda"),
    ],
)
def test_sequences_of_whole_mixtures_are_those_of_before(tiny, tokenizer, count, split, before):
    made = experiments.training_sequences(short(tiny, 2048), tokenizer, count, split)
    assert digest([(ids.tolist(), rows.tolist()) for ids, rows in made]) == before


@pytest.mark.parametrize(
    ("name", "train", "held_out", "lengths"),
    [
        ("tiny", 4, 3, 2),  # a quarter of its length would be too short
        ("embedded", 32, 4, 3),
        ("embedded-full", 96, 16, 3),
        ("llama-3.1-8b", 256, 40, 3),
    ],
)
def test_hashes_are_validated_on_every_length(
    monkeypatch, tokenizer, name, train, held_out, lengths
):
    """As before where the embedded model's profiles train; of 256, 40 are held out, 41 before."""
    asked = []

    def given(model, sequences, recipe, *, validation, **_):
        asked.append((sequences, validation))

    monkeypatch.setattr(experiments, "train_hash_weights", given)
    monkeypatch.setattr(experiments, "attends_by_distance", lambda model: False)
    monkeypatch.setattr(experiments, "sequences", lambda *_, length, **__: _[2] * [length])
    experiments.train_hashes(load_profile(name), None, tokenizer, "x")
    ((sequences, validation),) = asked
    assert (len(sequences), len(validation)) == (train, held_out)
    assert len(set(validation)) == lengths


@pytest.mark.parametrize(("samples", "far"), [(1, 1), (2, 1), (5, 1), (6, 2), (16, 4), (50, 16)])
def test_the_longest_context_is_asked_whole_contexts(tiny, tmp_path, samples, far):
    generated = replace(tiny, samples_per_task=samples)
    assert experiments.long_samples(generated) == far
    own = replace(generated, data=str(tmp_path))
    assert experiments.long_samples(own) == max(1, samples // 3)


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_fine_tuning_scores_as_many_samples_as_asked_for(tiny, tokenizer, samples):
    found = finetuning.samples(short(replace(tiny, samples_per_task=samples)), tokenizer, 1024)
    assert len(found.scored) == samples and len(found.train) == 16

"""A profile of one length with records of one's own in a folder, through what notebooks call."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.generated import generated_records
from hashattn.evaluation.benchmarks.longbench import fine_tuning_split
from hashattn.evaluation.contamination import benchmarks, contamination
from hashattn.evaluation.measures.overlap import group_overlap
from hashattn.evaluation.records import save_records
from hashattn.evaluation.tables import (
    comparison_table,
    dataset_table,
    density_table,
    score_table,
    setup_table,
    sharing_table,
)
from hashattn.reproduce.access import load_model, require_access
from hashattn.reproduce.experiments import ablations, contenders, finetuning, frontier
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector
from hashattn.selectors.hash import HashSelector

LENGTH, TASKS = 512, ("faq", "contracts")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Two records a task, one of them asked; everything else as small as it can be."""
    folder = tmp_path_factory.mktemp("own")
    tiny = load_profile("tiny")
    tokenizer = load_model(tiny)[1]
    made = generated_records(tokenizer, 480, 2, seed=tiny.seed, tasks=("lookup", "needle"))
    for task, source in zip(TASKS, ("lookup", "needle"), strict=True):
        part = [replace(r, dataset=task) for r in made if r.dataset == source]
        save_records(part, folder / f"{task}.jsonl")
    fields = yaml.safe_load((repository() / "data" / "profiles" / "tiny.yaml").read_text())
    fields |= {
        "data": str(folder), "tasks": list(TASKS), "lengths": [LENGTH], "samples_per_task": 1,
        "densities": [0.125], "memory": [32],
        "methods": ["dense", "oracle", "window", "double_sparsity", "quest", "hash"],
    }  # fmt: skip
    fields["training"] |= {"sequences": 1, "length": LENGTH, "steps": 2}
    fields["ruler"] |= {"samples": 1}
    path = folder / "company.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_profile(str(path))


@pytest.fixture(scope="module")
def loaded(profile):
    require_access(profile)
    return load_model(profile)


@pytest.fixture(scope="module")
def weights(profile, loaded):
    return experiments.shipped_or_trained(profile, *loaded)


def test_its_two_lengths_are_the_one(profile):
    assert profile.frontier_length == profile.longest_length == LENGTH


def test_notebook_01(profile, loaded, results):
    trained = experiments.train_hashes(profile, *loaded, "default", layers=[1], progress=False)
    assert len(ablations.training_curves(trained))
    found = experiments.recall(profile, *loaded, {"hash": HashSelector.as_trained(trained)}, [])
    assert found.empty
    made = finetuning.samples(profile, loaded[1], profile.frontier_length)
    assert made.task == "multihop" and made.protocol.max_context is None  # generated: too few
    assert len(made.scored) == 1 and made.train
    with pytest.raises(ValueError, match="'faq' has 2 records, too few"):
        finetuning.samples(profile, loaded[1], LENGTH, "faq")
    tuned = {"shipped": experiments.shipped_or_trained(profile, *loaded)}
    points = finetuning.answers(profile, *loaded, tuned, made, LENGTH, progress=False)
    assert "dense" in points.index
    caught = finetuning.selection(profile, *loaded, tuned, made, LENGTH)
    assert set(caught.index.get_level_values("asked")) >= {"multihop", "text"}


def test_notebook_02(profile, loaded, weights, monkeypatch):
    codes = {"hash 32 bits": weights}
    calibrated = experiments.calibration(profile, *loaded)
    monkeypatch.setattr(contenders, "HATASelector", type("HATA", (), {
        "train": lambda *_, **__: make_selector("lsh", bits=32)
    }))  # fmt: skip
    others = contenders.other_methods(profile, calibrated)
    assert "lsh 32 bits" in others
    chosen = contenders.hash_selectors(codes) | {"lsh": others["lsh 32 bits"]}
    measured = experiments.recall(profile, *loaded, chosen, profile.lengths, [32])
    assert set(measured.context) == {LENGTH}
    held_out = experiments.captured(profile, *loaded, profile.frontier_length, 1, seed=4000)
    assert len(group_overlap(held_out, [32], profile.sink, profile.local))
    lengths = sorted({profile.frontier_length, profile.longest_length})
    errors = frontier.frontier(profile, *loaded, chosen, lengths, [1 / 8])
    assert len(frontier.summary(errors)) == 2


def test_notebook_03(profile, loaded, weights, results, tmp_path):
    calibrated = experiments.calibration(profile, *loaded)
    chosen = experiments.selectors(profile, weights, calibrated)
    methods = experiments.methods(profile, chosen)
    length = profile.frontier_length
    both = experiments.quality(profile, *loaded, methods, length, progress=False)
    assert both.groupby(["setup", "method"]).size().eq(len(TASKS)).all()  # a sample a task
    shown = both[both.setup == "B"]
    scores = score_table(shown)
    for table in (sharing_table(both), setup_table(both), density_table(shown),
                  comparison_table(shown), dataset_table(shown),
                  frontier.task_verdicts(shown, "hash")):  # fmt: skip
        assert len(table)
    few = experiments.long_context_methods(profile, methods)
    asked = experiments.long_samples(profile)
    far = experiments.quality(profile, *loaded, few, profile.longest_length, asked, progress=False)
    ruler = experiments.ruler(profile, *loaded, few[:1], progress=False)
    assert len(far) and len(ruler) == 2  # one sample in both setups
    assert len(contamination(weights, shown)) == len(TASKS)
    split = fine_tuning_split(experiments.records(profile, loaded[1], length, 16), 3, 13)
    assert (len(split.train), len(split.score)) == (0, 4)
    assert len(contamination({"data": {"benchmarks": benchmarks(split.train)}}, split.score)) == 2
    claims = Claims("03_longbench", tmp_path)
    experiments.quality_claims(claims, scores, score_table(far[far.setup == "B"]), profile)
    assert isinstance(claims.table(), pd.DataFrame)
    lines = (profile.results / "records" / f"length_{LENGTH}.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)

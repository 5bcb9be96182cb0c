"""Notebook 01's variants of one layer: side by side they are what they are one after the other."""

from dataclasses import replace

import pandas as pd

from hashattn.base.engines.threads import thread_count
from hashattn.hashing.recipe import TrainRecipe
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import ablations
from hashattn.reproduce.experiments.common import train_hashes
from hashattn.reproduce.profiles import HashTraining, load_profile


def test_variants_train_side_by_side_as_one_after_the_other(tmp_path, monkeypatch):
    training = HashTraining(sequences=4, length=512, steps=2, hidden=32)
    profile = replace(load_profile("tiny"), training=training)
    model, tokenizer = load_model(profile)
    default = TrainRecipe.signs()
    asked = {
        "default": {"recipe": default},
        "start: random": {"recipe": default.vary(init="random")},
        "by the output": {"recipe": default.vary(weigh="output"), "bits": 64},
    }
    tables, here = {}, []

    def counted(*arguments, **options):
        here.append(arguments[3])
        return train_hashes(*arguments, **options)

    monkeypatch.setattr(ablations, "train_hashes", counted)
    for threads in (1, 2):
        monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path / str(threads)))
        with thread_count(threads):
            tables[threads] = ablations._train_and_measure(profile, model, tokenizer, 1, 512, asked)
    assert list(tables[1].index) == list(asked) and tables[1]["bits"].tolist() == [32, 32, 64]
    pd.testing.assert_frame_equal(tables[1], tables[2], rtol=1e-4)
    assert len(here) == 3 + 1  # with two threads all but the first trained elsewhere
    for name in ("default", "start--random", "by-the-output"):
        files = [
            tmp_path / n / profile.name / "hash_training/ablation" / name / "hash_maps.safetensors"
            for n in "12"
        ]
        assert files[0].read_bytes() == files[1].read_bytes()

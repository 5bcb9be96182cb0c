"""What the shipped hash weights' cards say of their training data, made again and compared."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from hashattn.base.errors import HashWeightsError
from hashattn.evaluation.benchmarks.generated import generated_records
from hashattn.evaluation.contamination import NONE, contamination
from hashattn.hashing import HashWeights
from hashattn.hashing.sequences import data_hash
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.profiles import load_profile

FOLDERS = ["hash_weights", *(f"hash_variants/{name}" for name in experiments.VARIANTS)]


@pytest.fixture(scope="module")
def profile():
    return load_profile("embedded")


@pytest.fixture(scope="module")
def tokenizer(profile):
    return AutoTokenizer.from_pretrained(profile.hash_weights_path.parent)


@pytest.fixture(scope="module")
def trained(profile, tokenizer):
    return experiments.training_sequences(profile, tokenizer, profile.training.sequences)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_card_that_names_no_benchmark_was_trained_on_generated_texts_alone(
    profile, tokenizer, trained, folder
):
    path = profile.hash_weights_path.parent / folder / "hash_config.json"
    card = json.loads(path.read_text())["card"]
    assert card["data"]["train"]["sha256"] == data_hash([(i, r.unique()) for i, r in trained])
    scored = generated_records(tokenizer, 1024, 2, seed=profile.seed)
    table = contamination(card, scored)
    assert len(table) == len(profile.tasks) and set(table["found"]) == {NONE}


def test_training_and_evaluation_share_no_line(profile, tokenizer, trained):
    def lines(texts):
        return {line for text in texts for line in text.splitlines() if len(line) > 20}

    scored = lines(r.context for r in generated_records(tokenizer, 4096, 4, seed=profile.seed))
    learned = lines(tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in trained)
    again = experiments.sequences(profile, tokenizer, 1, length=4096, split="eval")
    assert lines(tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in again) & scored
    assert len(learned) > 100 and not learned & scored


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_shipped_card_knows_its_model_and_refuses_noise_in_one_layer(profile, folder):
    """pytest makes an error of a warning: no card is of the old kind."""
    model = load_model(profile)[0]
    path = profile.hash_weights_path.parent / folder
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        weights = HashWeights.load(path, model.to(dtype))
    assert list(weights.card["base_model"]["projections"]) == ["0", "1", "2", "3"]
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.normal_()
    with pytest.raises(HashWeightsError, match="norms of layer 2 "):
        HashWeights.load(path, model)


def test_weights_for_the_pretrained_model_are_whole_and_small():
    pretrained = load_profile("smollm2")
    folders = [folder for folder, _ in experiments.shipped(pretrained).values() if folder.is_dir()]
    assert len(folders) >= 3
    for folder in folders:
        weights = HashWeights.load(folder)
        config, card = weights.config, weights.card
        assert card["trained"] and (config.query_heads, config.kv_heads, config.head_dim) == (
            9,
            3,
            64,
        )
        assert set(pretrained.layers) <= set(config.layers) <= set(range(30))
        assert "text without tasks" in card["data"]["note"] and card["data"]["benchmarks"] == {}
        gain = [v["best"]["recall@32"] for v in card["validation"].values()]
        assert min(gain) > 10 / 32  # ten times what a random thirty-second would have
    root = pretrained.hash_weights_path.parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 12e6

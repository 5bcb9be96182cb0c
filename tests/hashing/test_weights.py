"""Saving, loading, identity, and every reason to refuse hash weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hashattn.base.errors import HashWeightsError
from hashattn.hashing import HashConfig, HashWeights
from hashattn.hashing.weight_files import CONFIG_FILE, MAPS_FILE
from helpers import tiny_model

LAYOUTS = ("per_kv_head", "per_query_head")


def trained(model=None, **fields):
    """Random maps that claim to be trained, for tests of files."""
    weights = HashWeights.for_model(model or tiny_model("llama"), hidden=8, **fields)
    return HashWeights(weights.config, weights.maps, {**weights.card, "trained": True})


@pytest.fixture
def saved(tmp_path):
    trained().save(tmp_path)
    return tmp_path


def edit_config(directory, change):
    path = directory / CONFIG_FILE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_tensors(directory, change):
    tensors = load_file(directory / MAPS_FILE)
    change(tensors)
    save_file(tensors, directory / MAPS_FILE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth, bits", [(1, 32), (2, 64), (3, 96)])
def test_round_trip_keeps_codes_card_and_hash(tmp_path, layout, depth, bits):
    model = tiny_model("llama")
    weights = trained(model, layout=layout, depth=depth, bits=bits)
    weights.save(tmp_path)
    again = HashWeights.load(tmp_path, model)
    assert again.config == weights.config and again.card == weights.card
    assert again.sha256 == weights.sha256
    keys, queries = torch.randn(2, 2, 9, 16), torch.randn(2, 4, 3, 16)
    for layer in weights.config.layers:
        codes = again.encode_keys(layer, keys)
        assert torch.equal(codes, weights.encode_keys(layer, keys))
        assert codes.shape == (2, weights.config.key_maps, 9, bits // 32)
        assert torch.equal(
            again.encode_queries(layer, queries), weights.encode_queries(layer, queries)
        )
        assert again.preactivations_queries(layer, queries).shape == (2, 4, 3, bits)


def test_rounded_weights_take_half_the_bytes(tmp_path):
    """Stored as bfloat16, exactly, and of the same content hash; others stay float32."""
    weights = trained()
    weights.save(tmp_path / "full")
    weights.rounded().save(tmp_path / "half")
    full, half = (load_file(tmp_path / name / MAPS_FILE) for name in ("full", "half"))
    assert {t.dtype for t in full.values()} == {torch.float32}
    rounded = {t.dtype for name, t in half.items() if name.endswith("weight")}
    assert rounded == {torch.bfloat16}
    again = HashWeights.load(tmp_path / "half")
    assert again.sha256 == weights.rounded().sha256 != weights.sha256
    assert all(t.dtype == torch.float32 for t in again.tensors().values())


def test_hash_is_stable_across_processes_and_sensitive_to_one_value():
    config = HashConfig((0, 2), 4, 2, 16, hidden=8)
    here = HashWeights.random(config, seed=5)
    code = (
        "from hashattn.hashing import HashConfig, HashWeights\n"
        "print(HashWeights.random(HashConfig((0, 2), 4, 2, 16, hidden=8), seed=5).sha256)"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert there.stdout.strip() == here.sha256
    assert HashWeights.random(config, seed=6).sha256 != here.sha256
    here.maps[2].key.biases[0][0, 0] += 1e-3
    assert HashWeights(config, here.maps, {}).sha256 != here.sha256


def test_low_precision_inputs_are_encoded_in_float32():
    weights = trained()
    keys = torch.randn(1, 2, 50, 16).bfloat16()
    assert torch.equal(weights.encode_keys(0, keys), weights.encode_keys(0, keys.float()))


def test_wrong_inputs_name_the_expected_shape():
    weights = trained()
    with pytest.raises(ValueError, match=r"keys have shape .*\(batch, 2, tokens, 16\)"):
        weights.encode_keys(0, torch.randn(1, 4, 5, 16))
    with pytest.raises(ValueError, match=r"queries have shape .*\(batch, 4, tokens, 16\)"):
        weights.encode_queries(0, torch.randn(1, 4, 5, 8))
    with pytest.raises(ValueError, match=r"layer 7 has no hash maps.*\[0, 1\]"):
        weights.encode_keys(7, torch.randn(1, 2, 5, 16))


@pytest.mark.parametrize("name", [CONFIG_FILE, MAPS_FILE])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(HashWeightsError, match=f"{name} does not exist.*train"):
        HashWeights.load(saved)


def test_missing_directory(tmp_path):
    with pytest.raises(HashWeightsError, match="does not exist.*HashWeights.save"):
        HashWeights.load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_maps(saved, keep):
    content = (saved / MAPS_FILE).read_bytes()
    size = int(len(content) * keep) if isinstance(keep, float) else keep
    (saved / MAPS_FILE).write_bytes(content[:size])
    with pytest.raises(HashWeightsError, match="truncated or damaged.*copy it again"):
        HashWeights.load(saved)


def test_unreadable_config(saved):
    text = (saved / CONFIG_FILE).read_text()
    (saved / CONFIG_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(HashWeightsError, match="not readable JSON"):
        HashWeights.load(saved)
    (saved / CONFIG_FILE).write_text('{"model_type": "llama"}')
    with pytest.raises(HashWeightsError, match="was not written by"):
        HashWeights.load(saved)


def test_impossible_or_newer_config(saved):
    edit_config(saved, lambda r: r["config"].update(bits=40))
    with pytest.raises(HashWeightsError, match="bits = 40"):
        HashWeights.load(saved)
    edit_config(saved, lambda r: r["config"].update(bits=32, colour="red"))
    with pytest.raises(HashWeightsError, match="impossible hash maps"):
        HashWeights.load(saved)
    edit_config(saved, lambda r: r.update(format_version=99))
    with pytest.raises(HashWeightsError, match="format 99.*install"):
        HashWeights.load(saved)


def test_wrong_shape(saved):
    name = "layers.1.query.0.weight"
    edit_tensors(saved, lambda t: t.update({name: torch.zeros(4, 16, 9)}))
    with pytest.raises(HashWeightsError, match=r"layers.1.query.0.weight has shape \(4, 16, 9\)"):
        HashWeights.load(saved)


def test_missing_tensor(saved):
    edit_tensors(saved, lambda t: t.pop("layers.0.key.1.bias"))
    with pytest.raises(HashWeightsError, match="disagree on tensors .*layers.0.key.1.bias"):
        HashWeights.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(saved, value):
    edit_tensors(saved, lambda t: t["layers.0.key.1.bias"].fill_(value))
    with pytest.raises(HashWeightsError, match="layers.0.key.1.bias holds NaN or infinite"):
        HashWeights.load(saved)


def test_altered_values(saved):
    edit_tensors(saved, lambda t: t["layers.0.key.1.bias"].add_(0.5))
    with pytest.raises(HashWeightsError, match="does not match the content hash"):
        HashWeights.load(saved)


def test_untrained_weights_need_permission(tmp_path):
    weights = HashWeights.for_model(tiny_model("llama"), hidden=8)
    weights.save(tmp_path)
    assert not weights.trained
    with pytest.raises(HashWeightsError, match="random-initialised.*allow_untrained=True"):
        HashWeights.load(tmp_path)
    assert not HashWeights.load(tmp_path, allow_untrained=True).trained


@pytest.mark.parametrize(
    "family, message",
    [
        ("llama_mqa", "kv_heads 2, the model has 1"),
        ("qwen3", "were made for .*config_fingerprint"),
        ("gemma2", r"layers \[0\]"),
    ],
)
def test_another_architecture_is_refused(saved, family, message):
    with pytest.raises(HashWeightsError, match=message):
        HashWeights.load(saved, tiny_model(family))


def test_another_models_weights_are_refused_and_another_dtype_is_not(saved):
    with pytest.raises(HashWeightsError, match="weights_fingerprint"):
        HashWeights.load(saved, tiny_model("llama", seed=1))
    HashWeights.load(saved, tiny_model("llama", torch.bfloat16))


def test_layers_asked_for_must_have_full_attention():
    assert HashWeights.for_model(tiny_model("gemma2"), hidden=8).config.layers == (1,)
    with pytest.raises(ValueError, match=r"layers = \[0, 1\]: must be some of \[1\]"):
        HashWeights.for_model(tiny_model("gemma2"), layers=[0, 1])

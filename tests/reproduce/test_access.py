"""load_model places a model as its profile says, or says what is missing before it loads."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.base.errors import UnsupportedModelError
from hashattn.reproduce.access import AccessError, load_model, require_access
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import make_selector
from helpers import generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)


def placed(placement, device="auto"):
    return dataclasses.replace(load_profile("tiny"), placement=placement, device=device)


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="transformers places models with accelerate")


@pytest.fixture
def torchrun(monkeypatch):
    """As a process of three, the second, with no model to be loaded."""
    monkeypatch.setattr("hashattn.reproduce.access.find_spec", lambda name: name)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)


@pytest.mark.parametrize("placement", ["device_map", "tensor_parallel"])
def test_a_missing_accelerate_is_said_first(monkeypatch, placement):
    monkeypatch.setattr("hashattn.reproduce.access.find_spec", lambda name: None)
    with pytest.raises(AccessError, match=f"'{placement}' needs .* pip install accelerate"):
        require_access(placed(placement))
    require_access(placed("single"))


def test_tensor_parallelism_without_torchrun(monkeypatch):
    monkeypatch.setattr("hashattn.reproduce.access.find_spec", lambda name: name)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AccessError, match="torchrun --nproc-per-node .*`placement: device_map`"):
        require_access(placed("tensor_parallel"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(AccessError, match="torchrun"):
        require_access(placed("tensor_parallel"))


def test_heads_that_the_processes_cannot_share_are_refused_before_loading(torchrun):
    with pytest.raises(UnsupportedModelError, match="2 KV heads .* 3 processes: start 1 or 2"):
        load_model(placed("tensor_parallel"))


def test_a_device_map_answers_as_one_device(accelerate, monkeypatch):
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def noting(folder, **settings):
        asked.append(settings.get("device_map"))
        return load(folder, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    (single, tokenizer), (spread, _) = map(load_model, (placed("single"), placed("device_map")))
    assert asked == [None, "auto"]
    ids = tokenizer(40 * "Nothing happens here. ", return_tensors="pt").input_ids.to(single.device)
    found = []
    for model in (single, spread):
        weights = HashWeights.load("data/embedded/hash_weights", model)
        with attach(model, HashSelector(weights), Budget(density=1 / 8)):
            found.append(generate(model, ids)[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["hash", "lsh", "h2o"])
def test_layers_that_accelerate_keeps_elsewhere(accelerate, tmp_path, name):
    """Hooks move a layer's weights and arguments, as between GPUs; here from a disk."""
    model = tiny_model("llama")
    weights = HashWeights.for_model(model, layout="per_query_head", hidden=16)
    selector = HashSelector(weights) if name == "hash" else make_selector(name)
    with attach(model, selector, SMALL, allow_untrained=True):
        expected = generate(model, prompt())
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    weights.check_model(model)
    with attach(model, selector, SMALL, allow_untrained=True):
        found = generate(model, prompt())
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

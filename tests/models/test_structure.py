"""Layers whose window limits nothing have full attention, for hash maps and for attach alike."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import AutoConfig

from hashattn import Budget, HashSelector, HashWeights, attach, make_selector
from hashattn.base.errors import UnsupportedModelError
from hashattn.hashing import capture, train_hash_weights
from hashattn.models.families import layer_kinds
from hashattn.models.structure import attention_shapes, full_attention_layers
from helpers import _SHAPE, generate, prompt, tiny_model

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
SMALL = Budget(sink=1, local=3, heavy=6)


def windowed(family, seed=0, **settings):
    """A small model that takes its window (512 positions) from `settings`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SHAPE, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.mark.parametrize(
    "config, kinds",
    [
        (Phi3Config(sliding_window=262144, max_position_embeddings=131072), {FULL}),
        (Phi3Config(sliding_window=131072, max_position_embeddings=131072), {FULL}),
        (Phi3Config(sliding_window=2047, max_position_embeddings=131072), {SLIDING}),
        (MistralConfig(sliding_window=4096, max_position_embeddings=4096), {FULL}),
        (MistralConfig(sliding_window=None), {FULL}),
        (LlamaConfig(attention_chunk_size=8192, max_position_embeddings=8192), {FULL}),
        (LlamaConfig(attention_chunk_size=512, max_position_embeddings=8192), {CHUNKED}),
        (LlamaConfig(sliding_window=16, use_sliding_window=False), {FULL}),
        (Llama4TextConfig(attention_chunk_size=512, max_position_embeddings=1024), {FULL, CHUNKED}),
        (Llama4TextConfig(attention_chunk_size=1024, max_position_embeddings=1024), {FULL}),
        (Gemma3TextConfig(sliding_window=512, max_position_embeddings=1024), {FULL, SLIDING}),
        (Gemma3TextConfig(sliding_window=2048, max_position_embeddings=1024), {FULL}),
    ],
)
def test_a_window_as_long_as_the_positions_is_none(config, kinds):
    assert set(layer_kinds(config)) == kinds


def test_layers_before_max_window_layers_have_no_window():
    named = Qwen2Config(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=3
    )
    unnamed = LlamaConfig(num_hidden_layers=4, sliding_window=16, max_window_layers=3)
    for config in (named, unnamed):
        assert layer_kinds(config) == (FULL, FULL, FULL, SLIDING)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("phi3", {"sliding_window": 1024}),
        ("mistral", {"sliding_window": 512}),
        ("gemma3_text", {"sliding_window": 600, "layer_types": [SLIDING, FULL], "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_a_model_with_a_window_that_limits_nothing_runs_sparse(family, settings, cache):
    model = windowed(family, **settings)
    assert attention_shapes(model)["layers"] == (0, 1) and full_attention_layers(model) == {0, 1}
    assert set(capture(model, prompt(), chunk=8)) == {0, 1}
    weights = HashWeights.for_model(model, hidden=8)
    assert weights.config.layers == (0, 1)
    with attach(model, HashSelector(weights), SMALL, allow_untrained=True) as run:
        generate(model, prompt(), **cache)
    assert run.receipt.is_sparse and set(run.receipt.dense_reasons) == {"prefill"}
    with attach(model, make_selector("oracle"), Budget(heavy=1000), allow_dense=True):
        covering = generate(model, prompt(), **cache)[1]
    torch.testing.assert_close(covering, generate(model, prompt(), **cache)[1], rtol=0, atol=1e-4)


def test_it_answers_as_the_same_model_without_a_window():
    long, none = (windowed("mistral", sliding_window=size) for size in (512, None))
    logits = []
    for model in (long, none):
        with attach(model, make_selector("oracle"), SMALL):
            logits.append(generate(model, prompt())[1])
    assert torch.equal(*logits)


def test_a_cache_that_was_filled_before_attach_is_kept_and_one_that_has_slid_stays_dense():
    model = windowed("mistral", sliding_window=512)
    for length, reason in ((40, None), (520, "unsupported_cache")):
        cache, ids = DynamicCache(config=model.config), prompt(length=length)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            with attach(model, make_selector("random"), SMALL, allow_dense=True) as run:
                model(ids[:, :1], past_key_values=cache)
        assert [count.reason for count in run.receipt.counts] == [reason, reason]


def test_beyond_its_positions_the_window_limits_again():
    model = windowed("mistral", sliding_window=48, max_position_embeddings=48)
    expected = generate(model, prompt(), max_new_tokens=20)[1]
    with attach(model, make_selector("oracle"), Budget(heavy=1000), allow_dense=True):
        covering = generate(model, prompt(), max_new_tokens=20)[1]
    torch.testing.assert_close(covering, expected, rtol=0, atol=1e-4)
    captured = capture(model, prompt(length=60), chunk=8)[1]
    assert captured.keys.shape[1] == captured.queries.shape[1] == 60


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_model("mistral_sliding"),
        lambda: windowed("phi3", sliding_window=100),
        lambda: windowed("gemma3_text", sliding_window=8, layer_types=[SLIDING] * 2, head_dim=16),
    ],
)
def test_a_model_with_nothing_to_make_sparse_is_refused_before_any_work(model, tmp_path):
    model, said = model(), "nothing to make sparse: none of its 2 layers.*sliding_window="
    with pytest.raises(UnsupportedModelError, match=said):
        attach(model, make_selector("random"), SMALL)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UnsupportedModelError, match=said):
        HashWeights.for_model(model)
    with pytest.raises(UnsupportedModelError, match=said):
        train_hash_weights(model, [], out_dir=tmp_path)

"""Captured queries and keys are those that attention reads, and the model is left as it was."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hashattn.base.errors import UnsupportedModelError
from hashattn.hashing import capture
from helpers import prompt, tiny_model

FAMILIES = [
    "llama",
    "llama_mqa",
    "mistral",
    "qwen2_sliding",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
]


def eager_attention_seen(model, ids):
    """Reference without our code: eager attention weights of one un-chunked pass."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, use_cache=False, output_attentions=True).attentions


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_queries_and_keys_give_the_models_own_attention(family):
    model, ids = tiny_model(family), prompt(length=40)
    captured = capture(model, ids, chunk=16)
    attention = eager_attention_seen(model, ids)
    assert captured
    for layer, c in captured.items():
        group = c.queries.shape[0] // c.keys.shape[0]
        logits = c.queries @ c.keys.repeat_interleave(group, 0).transpose(1, 2) * c.scaling
        if c.softcap is not None:
            logits = torch.tanh(logits / c.softcap) * c.softcap
        causal = torch.ones(40, 40).tril().bool()
        weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        assert torch.allclose(weights, attention[layer][0], atol=1e-5)
    assert (captured[max(captured)].softcap is not None) == (family == "gemma2")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_post_rope_tensors_equal_those_of_a_cache_and_chunks_do_not_matter(family):
    model, ids = tiny_model(family), prompt(length=50)
    whole = capture(model, ids, chunk=1000, values=True)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for layer, c in whole.items():
        assert torch.allclose(c.keys, cache.layers[layer].keys[0], atol=1e-6)
        assert torch.allclose(c.values, cache.layers[layer].values[0], atol=1e-6)
    for chunk in (1, 7, 50):
        parts = capture(model, ids[0], chunk=chunk)
        for layer, c in whole.items():
            assert parts[layer].values is None
            assert torch.allclose(parts[layer].queries, c.queries, atol=1e-5)
            assert torch.allclose(parts[layer].keys, c.keys, atol=1e-5)


def test_rows_choose_queries_and_keys_stay_whole():
    model, ids = tiny_model("llama"), prompt(length=50)
    every, some = (
        capture(model, ids),
        capture(model, ids, rows=torch.tensor([31, 3, 49, 3]), chunk=8),
    )
    for layer, c in some.items():
        assert c.positions.tolist() == [3, 31, 49]
        assert torch.allclose(c.queries, every[layer].queries[:, [3, 31, 49]], atol=1e-5)
        assert c.keys.shape[1] == 50


def test_only_full_attention_layers_are_captured():
    model = tiny_model("gemma2")
    assert list(capture(model, prompt(), chunk=8)) == [1]
    assert list(capture(model, prompt(), layers=[1])) == [1]
    with pytest.raises(UnsupportedModelError, match=r"layers \[0\].*full-attention"):
        capture(model, prompt(), layers=[0, 1])
    with pytest.raises(UnsupportedModelError, match="full-attention layers only"):
        capture(tiny_model("mistral_sliding"), prompt())


def test_the_model_is_left_as_it_was_even_after_an_error():
    model, ids = tiny_model("llama"), prompt()
    model.train()
    with torch.no_grad():
        before = model(ids).logits
    name = model.config._attn_implementation
    capture(model, ids)
    with pytest.raises(IndexError):
        capture(model, ids + 10_000)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == name and model.training


def test_bfloat16_models_give_bfloat16_captures():
    captured = capture(tiny_model("llama", torch.bfloat16), prompt())
    assert captured[0].keys.dtype == captured[0].queries.dtype == torch.bfloat16


def test_a_model_outside_the_attention_interface_is_refused():
    config = AutoConfig.for_model(
        "falcon", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        capture(AutoModelForCausalLM.from_config(config), prompt())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": prompt(batch=2)}, "one sequence"),
        ({"input_ids": torch.zeros(0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": prompt(), "rows": torch.tensor([40])}, "positions from 0 to 39"),
        ({"input_ids": prompt(), "rows": torch.tensor([-1])}, "positions from 0 to 39"),
        ({"input_ids": prompt(), "chunk": 0}, "chunk = 0: must be an integer of at least 1"),
    ],
)
def test_bad_arguments_say_what_to_pass(arguments, message):
    with pytest.raises(ValueError, match=message):
        capture(tiny_model("llama"), **arguments)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_shift_turns_keys_and_queries_and_leaves_attention_as_it_was(family):
    model, ids = tiny_model(family), prompt(length=50)
    here, there = (capture(model, ids, chunk=16, shift=shift) for shift in (0, 300))
    with torch.no_grad():
        places = torch.arange(300, 350)[None]
        cache = model(ids, use_cache=True, position_ids=places).past_key_values
    for layer, c in there.items():
        torch.testing.assert_close(c.keys, cache.layers[layer].keys[0], rtol=0, atol=1e-5)
        assert torch.equal(c.positions, here[layer].positions)
        assert (c.keys - here[layer].keys).abs().max() > 0.1
        logits = [x.queries @ x.keys.repeat_interleave(len(x.queries) // len(x.keys), 0).mT
                  for x in (here[layer], c)]  # fmt: skip
        torch.testing.assert_close(*logits, rtol=0, atol=1e-3)

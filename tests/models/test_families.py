"""Each family's quirk, read from a configuration, a module or keywords."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, DeepseekV3Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from hashattn.models import families


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2), (4, 2, 16)),
        (GPTNeoXConfig(hidden_size=64, num_attention_heads=4), (4, 4, 16)),  # names no KV heads
        (
            Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=32),
            (4, 1, 32),
        ),
    ],
)
def test_head_counts(config, shapes):
    names = ("query_heads", "kv_heads", "head_dim")
    assert families.head_shapes(config) == dict(zip(names, shapes, strict=True))


def test_only_latent_caches_are_latent():
    assert families.caches_latents(DeepseekV3Config())
    assert not families.caches_latents(LlamaConfig())


def test_positions_may_have_no_limit():
    assert families.max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert families.max_positions(BloomConfig()) is None  # ALiBi


@pytest.mark.parametrize("name", ["k_proj", "qkv_proj", "query_key_value"])
def test_a_plan_splits_keys_by_any_familys_projection(name):
    assert families.splits_keys({f"layers.*.self_attn.{name}": "colwise"})
    assert not families.splits_keys({f"layers.*.self_attn.{name}": "colwise_rep"})
    assert not families.splits_keys({"layers.*.mlp.up_proj": "colwise"})


def test_cap_sinks_and_bias_are_read_from_keywords_and_sinks_from_the_module_too():
    module, sinks = nn.Module(), torch.zeros(4)
    assert families.logit_cap({"softcap": 50.0}) == 50.0 and families.logit_cap({}) is None
    assert families.softmax_sinks(module, {}) is None
    assert families.softmax_sinks(module, {"s_aux": sinks}) is sinks
    module.sinks = nn.Parameter(torch.ones(4))
    assert families.softmax_sinks(module, {}) is module.sinks
    assert families.softmax_sinks(module, {"s_aux": sinks}) is sinks
    assert families.adds_position_bias({"position_bias": sinks})
    assert not families.adds_position_bias({"position_bias": None})

"""With a budget that covers the cache, the sparse path computes dense attention.

Every family, and every way of calling it, against the same model before attach.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hashattn import Budget, attach
from helpers import SPARSE_FAMILIES, TracingOracle, generate, left_padded, prompt, tiny_model

EVERYTHING = Budget(density=1.0)
FP32 = 1e-5
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 50},
    "beam_search": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "chunked_prefill": {"prefill_chunk_size": 8},
    "static_cache": {"cache_implementation": "static"},
    "static_chunked": {"cache_implementation": "static", "prefill_chunk_size": 8},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
}


def attach_everything(model, **settings):
    selector = TracingOracle(settings.pop("layout", "per_query_head"))
    return attach(model, selector, EVERYTHING, allow_dense=True, **settings), selector


def compare(model, ids, mask=None, **settings):
    """Run both, compare, and return the attachment of the sparse run."""
    tokens, logits = generate(model, ids, mask, **settings)
    attachment, selector = attach_everything(model)
    with attachment:
        sparse_tokens, sparse_logits = generate(model, ids, mask, **settings)
    assert torch.equal(sparse_tokens, tokens)
    torch.testing.assert_close(sparse_logits, logits, rtol=0, atol=FP32)
    return attachment, selector


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_families(family):
    model = tiny_model(family)
    attachment, selector = compare(model, prompt())
    full = attachment._state.run.full_layers
    assert len(full) == (1 if uses_windows(family) else 2)
    steps = 11  # 12 new tokens, the first one from the prefill
    assert attachment.receipt.sparse_calls == steps * len(full)
    assert attachment.receipt.density == 1.0
    assert set(selector.calls) == full
    assert selector.encoded == {layer: 40 + steps for layer in full}  # once per token


def uses_windows(family: str) -> bool:
    return family in ("qwen2_sliding", "gemma2", "gemma3")


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_families_left_padded(family):
    compare(tiny_model(family), *left_padded())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "gemma2", "gpt_neox"])
def test_ways_of_generating(family, way):
    ids, mask = left_padded((20, 13))
    if way == "prompt_lookup":  # batch 1 only
        ids, mask = prompt(length=20), None
    attachment, _ = compare(tiny_model(family), ids, mask, max_new_tokens=6, **WAYS[way])
    assert attachment.receipt.sparse_calls


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dense_calls_keep_the_models_attention(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        attention = None  # transformers' default: SDPA has no logit cap
    model = tiny_model(family, attention=attention)
    ids = prompt()
    with torch.no_grad():
        before = model(ids).logits
        with attach(model, TracingOracle(), EVERYTHING, allow_dense=True):
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("family", ["llama", "llama_mqa", "gemma2"])
def test_question_window(family, layout):
    """Several query rows on a cached context, with and without padding."""
    model = tiny_model(family)
    ids, mask = left_padded((30, 21))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :24], attention_mask=mask[:, :24], past_key_values=cache)
        dense = model(ids[:, 24:], attention_mask=mask, past_key_values=cache).logits
        attachment, selector = attach_everything(model, sparse_rows=6, layout=layout)
        with attachment:
            cache = DynamicCache(config=model.config)
            model(ids[:, :24], attention_mask=mask[:, :24], past_key_values=cache)
            sparse = model(ids[:, 24:], attention_mask=mask, past_key_values=cache).logits
    assert selector.calls
    torch.testing.assert_close(sparse, dense, rtol=0, atol=FP32)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_bfloat16_within_its_rounding(family):
    """No further from the float32 model than the model's own bfloat16 attention."""
    ids = prompt()
    exact = stepwise(tiny_model(family), ids)
    model = tiny_model(family, dtype=torch.bfloat16)
    own = (stepwise(model, ids) - exact).abs().max()
    attachment, _ = attach_everything(model)
    with attachment:
        sparse = (stepwise(model, ids) - exact).abs().max()
    ulp = exact.abs().max() * 2**-8
    assert 0 < own and sparse <= 1.5 * own + ulp


def stepwise(model, ids: torch.Tensor, prefill: int = 32) -> torch.Tensor:
    """Logits of the tokens after `prefill`, one decode step each."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :prefill], past_key_values=cache)
        steps = [
            model(ids[:, at : at + 1], past_key_values=cache).logits
            for at in range(prefill, ids.shape[1])
        ]
    return torch.cat(steps, dim=1).float()


def test_multi_turn():
    model = tiny_model("llama")
    ids, more = prompt(), prompt(length=5, seed=3)

    def two_turns():
        cache = DynamicCache(config=model.config)
        first, _ = generate(model, ids, past_key_values=cache)
        return generate(model, torch.cat([first, more], dim=1), past_key_values=cache)

    tokens, logits = two_turns()
    attachment, selector = attach_everything(model)
    with attachment:
        sparse_tokens, sparse_logits = two_turns()
    assert torch.equal(sparse_tokens, tokens)
    torch.testing.assert_close(sparse_logits, logits, rtol=0, atol=FP32)
    assert set(selector.encoded.values()) == {tokens.shape[1] - 1}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_user_made_static_cache(family):
    """Without padding the prefill has no mask, although the buffer is longer than the prompt."""
    model = tiny_model(family)
    ids = prompt()

    def run():
        cache = StaticCache(config=model.config, max_cache_len=64)
        return generate(model, ids, past_key_values=cache)

    tokens, logits = run()
    attachment, selector = attach_everything(model)
    with attachment:
        sparse_tokens, sparse_logits = run()
    assert torch.equal(sparse_tokens, tokens) and selector.calls
    torch.testing.assert_close(sparse_logits, logits, rtol=0, atol=FP32)


def test_cache_without_config():
    """DynamicCache() makes its layers one by one, all of them full attention."""
    model = tiny_model("qwen2_sliding")
    ids, mask = left_padded()
    tokens, _ = generate(model, ids, mask, past_key_values=DynamicCache())
    attachment, selector = attach_everything(model)
    with attachment:
        sparse_tokens, _ = generate(model, ids, mask, past_key_values=DynamicCache())
    assert torch.equal(sparse_tokens, tokens)
    assert set(selector.calls) == {0}  # layer 1 is a sliding window


def test_no_cache_is_dense():
    attachment, selector = compare(tiny_model("llama"), prompt(), use_cache=False)
    assert not selector.calls
    assert set(attachment.receipt.dense_reasons) == {"no_cache"}

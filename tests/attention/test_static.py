"""Steps over a static cache: one operator in one graph, the same tokens, the same receipt."""

from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters as compiled
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, StaticCache

from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.attention import dispatch
from hashattn.base.errors import NonFiniteError, UnsupportedModelError
from hashattn.base.repository import repository
from hashattn.hashing.maps import HashConfig
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
STATIC = {"cache_implementation": "static", "disable_compile": True}


def selector(**options) -> HashSelector:
    config = HashConfig((0, 1), 4, 2, 16, "per_kv_head", 32, depth=2, hidden=16)
    method = HashSelector(HashWeights.random(config, seed=0), **options)
    lists = 4 if method.layout == "per_query_head" else 2
    return method._with(slopes={layer: torch.full((lists,), 0.5) for layer in (0, 1)})


@contextmanager
def compiling(backend: str):
    """Settings of `generate` that compile its steps, and allow no graph break."""
    settings = CompileConfig(backend=backend, mode=None, fullgraph=True)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    compiled.clear()
    yield {"cache_implementation": "static", "compile_config": settings}
    torch._dynamo.reset()


@pytest.fixture
def prompts_only(monkeypatch):
    """How many rows had the calls outside the operator, in which the host counts tokens."""
    rows, forward = [], dispatch._forward
    monkeypatch.setattr(
        dispatch, "_forward",
        lambda call, inputs: rows.append(inputs.query.shape[2]) or forward(call, inputs),
    )  # fmt: skip
    return rows


def test_a_compiled_step_is_one_graph_with_the_tokens_and_the_receipt_of_the_eager_one():
    folder = repository() / "data" / "embedded"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "Note: Alice visits Kyoto\n" + 9 * "Nothing happens here, and nothing will.\n"
    ids = tokenizer(text + "Q: Alice visits", return_tensors="pt").input_ids
    method = HashSelector(HashWeights.load(folder / "hash_weights", model))
    with attach(model, method, Budget(density=1 / 4)) as run:
        expected, logits = generate(model, ids, max_new_tokens=8)
        eager = run.reset_receipt()
        with compiling("eager") as settings:
            for _ in range(2):
                found, same = generate(model, ids, max_new_tokens=8, **settings)
                assert torch.equal(found, expected)
                torch.testing.assert_close(same, logits, rtol=0, atol=1e-4)
                assert run.reset_receipt().to_dict() == eager.to_dict()
            assert compiled["stats"]["unique_graphs"] == 1 and not compiled["graph_break"]
    assert eager.sparse_calls == 4 * 7


@pytest.mark.parametrize("family", ["gemma2", "qwen2_sliding", "llama"])
def test_dense_layers_are_a_part_of_the_graph(family, prompts_only):
    """Sliding windows, and a layer that was told to stay dense."""
    model, ids = tiny_model(family), prompt(1, 40)
    kinds = {"allow_untrained": True, "dense_layers": (0,) if family == "llama" else ()}
    with attach(model, selector(), SMALL, **kinds) as run:
        expected = generate(model, ids, max_new_tokens=4)
        eager = run.reset_receipt()
        prompts_only.clear()
        with compiling("eager") as settings:
            found = generate(model, ids, max_new_tokens=4, **settings)
    assert prompts_only == [40, 40]
    assert torch.equal(found[0], expected[0])
    assert run.receipt.tokens_read == eager.tokens_read
    assert run.receipt.dense_reasons == eager.dense_reasons


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, SMALL),
        ({"scoring": "hamming", "layout": "per_kv_head"}, Budget(sink=2, local=3, density=0.4)),
        ({"layout": "per_kv_head"}, Budget(sink=1, local=2, heavy=8, sampled=0.5)),
        (
            {},
            Budget(heavy=8, local=2, shares=((0.5, 1.5), (1, 1)), sampled=((0, 0), (0.5, 1))),
        ),
    ],
    ids=["default", "hamming", "sampled", "shares"],
)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_static_steps_read_what_dynamic_ones_read(options, budget, backend, prompts_only):
    model, (ids, mask) = tiny_model("llama"), left_padded((40, 33))
    with attach(model, selector(**options), budget, allow_untrained=True) as run:
        expected = generate(model, ids, mask, max_new_tokens=4)
        eager = run.reset_receipt()
        prompts_only.clear()
        if backend is None:
            found = generate(model, ids, mask, max_new_tokens=4, **STATIC)
        else:
            with compiling(backend) as settings:
                found = generate(model, ids, mask, max_new_tokens=4, **settings)
                assert not compiled["graph_break"]
    assert prompts_only == [40, 40]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
    assert run.receipt.to_dict() == eager.to_dict()


def test_a_gap_in_the_prompts_mask_is_seen_before_the_first_step(prompts_only):
    """Two spans of tokens: read token by token of the mask, as over a dynamic cache."""
    model, ids = tiny_model("llama"), prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 10:14] = 0
    with attach(model, selector(), SMALL, allow_untrained=True):
        expected = generate(model, ids, mask, max_new_tokens=3)
        prompts_only.clear()
        found = generate(model, ids, mask, max_new_tokens=3, **STATIC)
    assert prompts_only.count(1) == 4
    assert torch.equal(found[0], expected[0])


def prefilled(model, ids) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids, past_key_values=cache)
    return cache


@torch.no_grad()
def test_a_gap_in_a_steps_own_mask_is_told():
    model, ids = tiny_model("llama"), prompt(1, 40)
    run = attach(model, selector(), SMALL, allow_untrained=True)
    cache = prefilled(model, ids)
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[0, 5] = 0
    model(ids[:, :1], past_key_values=cache, attention_mask=mask)
    with pytest.raises(UnsupportedModelError, match="between others in a step over a static"):
        run.detach()


@torch.no_grad()
def test_keys_that_are_no_numbers_are_told_by_a_static_step():
    model, ids = tiny_model("llama"), prompt(1, 40)
    with pytest.raises(NonFiniteError, match="layer 1"):
        with attach(model, selector(), SMALL, allow_untrained=True):
            cache = prefilled(model, ids)
            model.model.layers[1].self_attn.v_proj.bias = torch.nn.Parameter(
                torch.full((32,), torch.inf)
            )
            model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("way", ["detached", "by hand"])
def test_tokens_that_no_step_encoded_are_encoded_before_the_next(way):
    """Steps while nothing was attached, and keys that the caller added to the cache."""
    model, ids = tiny_model("llama"), prompt(1, 40)
    method, found = selector(), []
    budget = Budget(sink=1, local=1, heavy=6)
    for begin in (prefilled, lambda model, ids: model(ids).past_key_values):
        with attach(model, method, budget, allow_untrained=True, allow_dense=True):
            cache = begin(model, ids)
            model(ids[:, :1], past_key_values=cache)
            if way == "by hand":
                for layer in (0, 1):
                    new = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(layer))
                    cache.update(new, 2 * new, layer)
                found.append(model(ids[:, 3:4], past_key_values=cache).logits)
                continue
        model(ids[:, 1:6], past_key_values=cache)
        with attach(model, method, budget, allow_untrained=True):
            found.append(model(ids[:, 6:7], past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_short_contexts_are_read_whole():
    model, ids = tiny_model("llama"), prompt(1, 40)
    kinds = {"allow_untrained": True, "dense_below": 44}
    with attach(model, selector(), SMALL, **kinds) as run:
        expected = generate(model, ids, max_new_tokens=8)
        eager = run.reset_receipt()
        found = generate(model, ids, max_new_tokens=8, **STATIC)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
    assert run.receipt.tokens_read == eager.tokens_read
    assert eager.dense_reasons["short_context"] == 2 * 3


@torch.no_grad()
def test_a_cache_that_was_emptied_begins_anew():
    """Also with a prompt of one token, which is no step."""
    model, ids = tiny_model("llama"), prompt(1, 40)
    with attach(model, selector(), SMALL, allow_untrained=True) as run:
        cache = prefilled(model, ids)
        model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids[:, :1], past_key_values=cache)
        assert run.receipt.dense_reasons == {"prefill": 4}
        model(ids[:, 1:2], past_key_values=cache)
    assert run.receipt.sparse_calls == 4

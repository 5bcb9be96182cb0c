"""Selection with a budget smaller than the cache: independent of how the tokens got there."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache

from hashattn import Budget, attach
from hashattn.attention.cache import IndexedLayer
from hashattn.selectors.base import Selector
from hashattn.selectors.random import RandomSelector
from hashattn.selectors.window import WindowSelector
from helpers import (
    SPARSE_FAMILIES,
    TracingOracle,
    generate,
    left_padded,
    prompt,
    tiny_model,
)

SMALL = Budget(sink=1, local=3, heavy=6)
SAME = {"rtol": 0, "atol": 1e-5}


def sparse_logits(model, ids, mask=None, selector=None, budget=SMALL, **settings) -> Tensor:
    with attach(model, selector or RandomSelector(), budget) as run:
        logits = generate(model, ids, mask, **settings)[1]
    assert run.receipt.density < 0.5
    return logits


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_small_budget_changes_the_logits(family):
    """Guards the other tests: on these models a wrong selection is visible."""
    model = tiny_model(family)
    dense = generate(model, prompt())[1]
    sparse = sparse_logits(model, prompt())
    torch.testing.assert_close(sparse[:, 0], dense[:, 0], **SAME)  # from the prefill
    assert (sparse[:, 1] - dense[:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "selector", [RandomSelector(), TracingOracle(), TracingOracle("per_kv_head")]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_padding_does_not_change_the_selection(family, selector):
    model = tiny_model(family)
    ids, mask = left_padded((40, 33, 17))
    together = sparse_logits(model, ids, mask, selector)
    for row, length in enumerate((40, 33, 17)):
        alone = sparse_logits(model, ids[row : row + 1, 40 - length :], selector=selector)
        torch.testing.assert_close(together[row : row + 1], alone, **SAME)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk_size": 8},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 8},
    ],
    ids=["chunked", "static", "static_chunked"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_kind_of_cache_does_not_change_the_selection(family, settings):
    model = tiny_model(family)
    ids, mask = left_padded()
    expected = sparse_logits(model, ids, mask, TracingOracle())
    actual = sparse_logits(model, ids, mask, TracingOracle(), **settings)
    torch.testing.assert_close(actual, expected, **SAME)


def test_question_window_equals_single_steps():
    """Rows of one call are selected causally, as if they came one by one."""
    model = tiny_model("llama")
    ids = prompt(length=40)
    outputs = []
    for rows in (1, 6):
        with torch.no_grad(), attach(model, TracingOracle(), SMALL, sparse_rows=rows) as run:
            cache = DynamicCache(config=model.config)
            model(ids[:, :34], past_key_values=cache)
            parts = ids[:, 34:].split(rows, dim=1)
            logits = [model(part, past_key_values=cache).logits for part in parts]
        outputs.append(torch.cat(logits, dim=1))
        assert run.receipt.density == pytest.approx(10 / 37.5)
    torch.testing.assert_close(outputs[0], outputs[1], **SAME)


def test_short_prompt_is_a_prefill():
    """No context is cached yet, although the prompt has no more rows than sparse_rows."""
    model = tiny_model("llama")
    with attach(model, WindowSelector(), Budget(1, 1, heavy=0), sparse_rows=8, keep_steps=9) as run:
        generate(model, prompt(length=5), max_new_tokens=3)
    assert run.receipt.dense_reasons == {"prefill": 2}
    assert [step.cached for step in run.receipt.recent if step.layer == 0] == [6, 7]


def test_window_reads_sink_and_local_only():
    with attach(tiny_model("llama"), WindowSelector(), SMALL, keep_steps=99) as run:
        generate(run.model, prompt())
    assert {step.read for step in run.receipt.recent} == {4.0}


def test_density_budget_is_what_is_read():
    model = tiny_model("llama")
    with attach(model, TracingOracle(), Budget(2, 4, density=0.25), keep_steps=99) as run:
        generate(model, prompt(length=80), max_new_tokens=4)
    assert [step.cached for step in run.receipt.recent if step.layer == 0] == [81, 82, 83]
    assert {step.read for step in run.receipt.recent} == {20.0}


def prefill(model, ids) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def follow(model, cache, ids) -> Tensor:
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_cache_prefilled_before_attach(family):
    """One dense prefill serves many questions: catch up, crop back, ask again."""
    model = tiny_model(family)
    ids, question = prompt(length=50), prompt(length=6, seed=5)
    with attach(model, TracingOracle(), SMALL):
        expected = follow(model, prefill(model, ids), question)
    cache = prefill(model, ids)
    selector = TracingOracle()
    full = {0, 1} if family != "gemma2" else {1}
    for ask in range(1, 4):
        if family == "gemma2":  # its sliding layers forget what a crop would need
            cache = prefill(model, ids) if ask > 1 else cache
        with attach(model, selector, SMALL) as run:
            answer = follow(model, cache, question)
        torch.testing.assert_close(answer, expected, **SAME)
        assert run.receipt.dense_reasons.get("prefill") is None
        if family != "gemma2":
            cache.crop(-question.shape[1])
            assert selector.encoded == {layer: 50 + 6 * ask for layer in full}


def test_crop_while_detached_keeps_the_index():
    model = tiny_model("llama")
    ids, question = prompt(length=50), prompt(length=6, seed=5)
    cache, selector = prefill(model, ids), TracingOracle()
    with attach(model, selector, SMALL):
        first = follow(model, cache, question)
    cache.crop(-6)
    follow(model, cache, prompt(length=9, seed=6))  # dense, on the indexed layers
    cache.crop(-9)
    with attach(model, selector, SMALL):
        torch.testing.assert_close(follow(model, cache, question), first, **SAME)
    assert selector.encoded == {0: 50 + 2 * 6, 1: 50 + 2 * 6}


def test_another_selector_encodes_again():
    model = tiny_model("llama")
    cache = prefill(model, prompt(length=50))
    for selector in (TracingOracle(), TracingOracle("per_kv_head")):
        with attach(model, selector, SMALL):
            follow(model, cache, prompt(length=2, seed=5))
        cache.crop(-2)
        assert selector.encoded == {0: 52, 1: 52}


def test_reset_drops_the_index():
    model = tiny_model("llama")
    selector = TracingOracle()
    with attach(model, selector, SMALL):
        cache = prefill(model, prompt(length=20))
        cache.reset()
        with torch.no_grad():
            model(prompt(length=50, seed=2), past_key_values=cache)
        follow(model, cache, prompt(length=2, seed=5))
    assert selector.encoded == {0: 20 + 52, 1: 20 + 52}


def test_batch_operations_move_the_index():
    """TracingOracle checks at every step that the index still equals the keys."""
    model = tiny_model("llama")
    selector = TracingOracle()
    with attach(model, selector, SMALL):
        cache = prefill(model, prompt(batch=2, length=30))
        cache.batch_repeat_interleave(2)
        follow(model, cache, prompt(batch=4, length=2))
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
        follow(model, cache, prompt(batch=4, length=2))
        cache.batch_select_indices(torch.tensor([2, 0]))
        follow(model, cache, prompt(batch=2, length=2))
    assert selector.encoded == {0: 36, 1: 36}
    assert all(isinstance(layer, IndexedLayer) for layer in cache.layers)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copied_prefix_keeps_its_index(duplicate):
    model = tiny_model("llama")
    selector, question = TracingOracle(), prompt(length=4, seed=5)
    with attach(model, selector, SMALL):
        cache = prefill(model, prompt(length=50))
        first = follow(model, duplicate(cache), question)
        second = follow(model, duplicate(cache), question)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert selector.encoded == {0: 50 + 2 * 4, 1: 50 + 2 * 4}


def test_prompt_lookup_equals_plain_sparse_decoding():
    """Verification of drafts is sparse when sparse_rows covers it."""
    model = tiny_model("llama")
    ids = prompt(length=20).repeat(1, 2)
    with attach(model, TracingOracle(), SMALL):
        plain = generate(model, ids)
    with attach(model, TracingOracle(), SMALL, sparse_rows=8):
        drafted = generate(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted[0], plain[0])
    torch.testing.assert_close(drafted[1], plain[1], **SAME)


def test_dense_layers_stay_dense():
    model = tiny_model("llama")
    selector = TracingOracle()
    with attach(model, selector, SMALL, dense_layers=[0], keep_steps=99) as run:
        generate(model, prompt())
    assert set(selector.encoded) == {1}  # no index where none is used
    assert {step.layer: step.reason for step in run.receipt.recent} == {0: "dense_layer", 1: None}
    assert run.receipt.density < run.receipt.decode_density < 1


def test_gradients_of_an_evaluated_model_flow_through_attention():
    model = tiny_model("llama")
    with attach(model, TracingOracle(), SMALL):
        cache = prefill(model, prompt())
        model(prompt(length=1), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_compiled_static_generation():
    """Selection is left out of the graph, whose shapes it would make data-dependent."""
    model = tiny_model("llama")
    ids = prompt()
    expected = sparse_logits(model, ids, selector=TracingOracle(), max_new_tokens=4)
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual = sparse_logits(
        model,
        ids,
        selector=TracingOracle(),
        max_new_tokens=4,
        cache_implementation="static",
        compile_config=compiled,
    )
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    torch.testing.assert_close(actual, expected, **SAME)
    assert breaks and all("disable" in reason for reason in breaks), breaks


class Misshapen(Selector):
    name = "misshapen"

    def encode_keys(self, layer, keys):
        return {"codes": keys[:, :, 1:]} if self.bad_index else {}

    def __init__(self, bad_index: bool) -> None:
        self.bad_index = bad_index

    def scores(self, layer, queries, view, scaling):
        return queries.new_zeros(1, 1, 1, view.keys.shape[2])


@pytest.mark.parametrize(
    ("bad_index", "message"), [(True, "token axis must be axis 2"), (False, "expected .* lists")]
)
def test_shapes_of_selectors_are_checked(bad_index, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"misshapen.*{message}"):
        with attach(model, Misshapen(bad_index), SMALL):
            generate(model, prompt())


def test_layers_and_heads_read_their_shares():
    """The receipt counts what each layer read; the lists of a layer differ."""
    model = tiny_model("llama")
    shares = ((0.0, 1.0), (1.0, 2.0))
    oracle = TracingOracle("per_kv_head")
    with attach(model, oracle, Budget(2, 3, heavy=6, shares=shares), keep_steps=99) as run:
        generate(model, prompt(length=40), max_new_tokens=4)
    reads = {step.layer: step.read for step in run.receipt.recent}
    assert reads == {0: 5 + 3, 1: 5 + 9}
    assert run.receipt.settings["shares"] == shares
    with (
        attach(model, oracle, Budget(heavy=6, shares=((1.0,),))),
        pytest.raises(ValueError, match="KV heads of layer 1"),
    ):
        generate(model, prompt(length=40))

"""A running attachment goes on with another selector: cached keys are encoded again."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hashattn import Budget, HashSelector, attach, make_selector
from hashattn.attention.cache import IndexedLayer
from hashattn.base.errors import AttachmentError, HashWeightsError
from hashattn.hashing.weights import HashWeights
from helpers import TracingOracle, generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)


def maps(model, seed):
    made = HashWeights.for_model(model, seed=seed, depth=1)
    return HashWeights(made.config, made.maps, {**made.card, "trained": True})


def continued(model, cache, token, steps):
    """Logits (steps, vocabulary) of greedy steps over a cache."""
    logits = []
    for _ in range(steps):
        out = model(token, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1])
        token = out.logits[:, -1:].argmax(-1)
    return torch.stack(logits), token


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
def test_half_an_answer_goes_on_as_if_its_cache_had_been_encoded_by_the_new_maps(family):
    model = tiny_model(family)
    old, new = (HashSelector(maps(model, seed)) for seed in (0, 1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attach(model, old, SMALL) as run:
        first = model(prompt(), past_key_values=cache).logits[:, -1:].argmax(-1)
        _, token = continued(model, cache, first, 6)
        fresh = copy.deepcopy(cache)
        stayed, _ = continued(model, copy.deepcopy(cache), token, 6)
        finished = run.swap(new)
        swapped, _ = continued(model, cache, token, 6)
        assert finished.method["weights_sha256"] == old.weights.sha256
        assert run.receipt.method["weights_sha256"] == new.weights.sha256
        assert finished.sparse_calls and run.receipt.sparse_calls
    for layer in fresh.layers:
        if isinstance(layer, IndexedLayer):
            layer.drop_index()
    with torch.no_grad(), attach(model, new, SMALL):
        expected, _ = continued(model, fresh, token, 6)
    assert torch.equal(swapped, expected)
    assert not torch.equal(swapped, stayed)  # the maps do select apart


def test_all_keys_are_encoded_again_once():
    model, first, second = tiny_model("llama"), TracingOracle(), TracingOracle()
    with attach(model, first, SMALL) as run:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            token = model(prompt(), past_key_values=cache).logits[:, -1:].argmax(-1)
            continued(model, cache, token, 3)
            assert run.swap(second).decode_calls == 6
            continued(model, cache, token, 4)
    assert set(first.encoded.values()) == {43} and set(second.encoded.values()) == {47}


def test_an_observer_may_swap_between_two_layers():
    model, second = tiny_model("llama"), TracingOracle()

    class Swaps:
        timed = False

        def saw(self, step):
            if step.n == 44 and step.layer == 0:
                run.swap(second)

    with attach(model, TracingOracle(), SMALL) as run, run.listen(Swaps()):
        generate(model, prompt())
    assert second.calls == {0: 7, 1: 8}


def test_what_attach_refuses_is_refused_and_changes_nothing():
    model = tiny_model("llama")
    random = HashSelector(HashWeights.for_model(model, depth=1))
    drawn = Budget(sink=1, local=3, heavy=6, sampled=0.5)
    with attach(model, TracingOracle(), drawn) as run:
        receipt = run.receipt
        no_slopes = HashSelector(maps(model, 0))
        refused = ((random, HashWeightsError), ("hash", ValueError), (no_slopes, ValueError))
        for wrong, error in refused:
            with pytest.raises(error):
                run.swap(wrong)
        assert run.receipt is receipt
        generate(model, prompt())
    with pytest.raises(AttachmentError, match="attach again"):
        run.swap(TracingOracle())


@pytest.mark.parametrize("name", ["dense", "h2o"])
def test_what_is_not_sparse_or_has_to_observe_is_no_exchange(name):
    model = tiny_model("llama")
    with attach(model, TracingOracle(), SMALL) as run:
        generate(model, prompt())
        with pytest.raises(
            ValueError, match=f"selector = '{name}': must be sparse and no observer"
        ):
            run.swap(make_selector(name))


def test_a_swap_keeps_the_proof_that_the_run_was_sparse():
    model = tiny_model("llama")
    with attach(model, TracingOracle(), SMALL, keep_steps=2) as run:
        generate(model, prompt())
        run.swap(TracingOracle())
        assert run.receipt.keep_steps == 2  # and nothing is generated: leaving raises nothing

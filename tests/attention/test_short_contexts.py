"""Contexts below dense_below cost the model's own attention, and lose nothing of the index."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.base.errors import NonFiniteError
from helpers import TracingOracle, generate, left_padded, prompt, tiny_model

BUDGET = Budget(sink=2, local=4, heavy=6)
BELOW = 48


class Silent:
    """A listener, for which the index is kept up to date."""

    timed = False

    def saw(self, step):
        pass


def crossing(model, act, listened, below=BELOW):
    """What `act` returns with a model attached, and the receipt; listened: encoded eagerly."""
    selector = HashSelector(HashWeights.for_model(model, seed=3, depth=1))
    with attach(model, selector, BUDGET, dense_below=below, allow_untrained=True) as run:
        if listened:
            with run.listen(Silent()):
                result = act(model)
        else:
            result = act(model)
    return result, run.receipt


def tokens_and_cache(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 14, "do_sample": False} | settings
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    return out.sequences, out.past_key_values


def greedy(model):
    return tokens_and_cache(model, prompt(length=40))


def beams(model):
    return tokens_and_cache(model, prompt(2, 40), num_beams=3)


def padded(model):
    return tokens_and_cache(model, *left_padded((40, 33, 17)))


def long_prompt(model):
    return tokens_and_cache(model, prompt(length=60))


def chunked(model):
    return tokens_and_cache(model, prompt(length=60), prefill_chunk_size=25)


@torch.no_grad()
def cropped(model):
    """Over the threshold, back below it, other tokens, and over it again."""
    cache = DynamicCache(config=model.config)
    ids = prompt(length=70)
    seen = []
    for start, end in [(0, 45), *((i, i + 1) for i in range(45, 52))]:
        seen.append(model(ids[:, start:end], past_key_values=cache).logits[:, -1])
    cache.crop(-12)  # 40 are left
    for i in range(55, 70):
        seen.append(model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(seen), cache


@torch.no_grad()
def second_turn(model):
    """A turn that stays short, then one of several rows that does not."""
    ids = prompt(length=70)
    first, cache = tokens_and_cache(model, ids[:, :30], max_new_tokens=6)
    longer = torch.cat([first, ids[:, 30:50]], dim=1)
    return tokens_and_cache(model, longer, past_key_values=cache, max_new_tokens=6)


ACTS = [greedy, beams, padded, long_prompt, chunked, cropped, second_turn]


@pytest.mark.parametrize("act", ACTS, ids=[act.__name__ for act in ACTS])
def test_keys_that_were_left_get_the_same_codes_in_one_go(act):
    model = tiny_model("llama")
    (eager, eager_cache), eager_receipt = crossing(model, act, listened=True)
    (lazy, lazy_cache), lazy_receipt = crossing(model, act, listened=False)
    assert torch.equal(lazy, eager)
    assert lazy_receipt.to_dict()["counts"] == eager_receipt.to_dict()["counts"]
    assert lazy_receipt.sparse_calls
    for mine, other in zip(lazy_cache.layers, eager_cache.layers, strict=True):
        assert mine.index_length == other.index_length == mine.get_seq_length()
        codes, expected = (layer.stores["codes"].value.to_tokens() for layer in (mine, other))
        assert torch.equal(codes, expected)


def test_a_static_cache_is_encoded_as_it_is_written():
    model, selector = tiny_model("llama"), TracingOracle()
    with attach(model, selector, BUDGET, dense_below=BELOW, allow_dense=True) as run:
        static = {"cache_implementation": "static", "disable_compile": True}
        generate(model, prompt(length=30), max_new_tokens=4, **static)
    assert selector.encoded == {0: 33, 1: 33} and run.receipt.sparse_calls == 0


def test_nothing_is_encoded_below_and_each_key_once_after():
    model, selector, below = tiny_model("llama"), TracingOracle(), 48
    with attach(model, selector, BUDGET, dense_below=below, allow_dense=True):
        generate(model, prompt(length=30), max_new_tokens=18)  # 47 tokens at most
        assert not selector.encoded
        generate(model, prompt(length=30), max_new_tokens=21)  # 48, 49 and 50 are sparse
        assert selector.encoded == {0: 50, 1: 50} and selector.calls == {0: 3, 1: 3}
        generate(model, prompt(length=60), max_new_tokens=2)  # the prompt is encoded as it is read
        assert selector.encoded == {0: 111, 1: 111}
    with attach(model, selector, BUDGET) as run:  # by default as ever
        generate(model, prompt(length=30), max_new_tokens=3)
    assert selector.encoded == {0: 143, 1: 143} and run.receipt.sparse_calls == 4


@torch.no_grad()
def test_keys_that_were_left_are_checked_before_they_get_codes():
    model = tiny_model("llama")
    ids = prompt(length=50)
    cache = model(ids[:, :40], use_cache=True).past_key_values
    cache.layers[1].keys[0, 1, 7, 3] = torch.nan
    selector = TracingOracle()
    with pytest.raises(NonFiniteError, match="layer 1"):
        with attach(model, selector, BUDGET, dense_below=45):
            for i in range(40, 50):
                model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.get_seq_length() == 45 and selector.encoded == {0: 45}


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count[str(function)] += 1
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
def operations(model, n):
    """What a step after n - 1 tokens dispatches, the first steps left out."""
    ids = prompt(length=n + 3)
    cache = model(ids[:, : n - 1], use_cache=True).past_key_values
    model(ids[:, n - 1 : n], past_key_values=cache)
    with Operations() as mode:
        model(ids[:, n : n + 1], past_key_values=cache)
    return mode.count


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_short_step_dispatches_what_the_model_s_own_does(family):
    model = tiny_model(family)
    own, long_own = operations(model, 40), operations(model, 400)
    selector = HashSelector(HashWeights.for_model(model, seed=3, depth=1))
    settings = {"allow_untrained": True, "allow_dense": True}
    with attach(model, selector, BUDGET, dense_below=BELOW, **settings):
        short = operations(model, 40)
        # eager attention gets another mask, of fewer operations
        assert short == own or (family == "gemma2" and sum(short.values()) < sum(own.values()))
        assert operations(model, 400) != long_own  # sparse
    with attach(model, selector, BUDGET, dense_below=500, **settings):
        long = operations(model, 400)
    assert long == long_own or (family == "gemma2" and sum(long.values()) < sum(long_own.values()))


def test_keys_lie_beside_values_from_the_first_sparse_step_on():
    model = tiny_model("llama")

    def apart(cache):
        return [layer.keys.is_contiguous() for layer in cache.layers]

    with attach(model, TracingOracle(), BUDGET, dense_below=BELOW, allow_dense=True):
        assert apart(tokens_and_cache(model, prompt(length=30), max_new_tokens=18)[1]) == [True] * 2
        short = tokens_and_cache(model, prompt(length=30), max_new_tokens=19)[1]
        assert apart(short) == [False] * 2 and short.get_seq_length() == BELOW
        assert apart(tokens_and_cache(model, prompt(length=60), max_new_tokens=1)[1]) == [False] * 2


def test_compiled_steps_of_a_static_cache_know_what_stays_dense():
    """Sliding layers beside those that are dense while the context is short."""
    model, ids = tiny_model("gemma2"), prompt(length=40)
    selector = HashSelector(HashWeights.for_model(model, seed=3, depth=1))
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiled}
    kinds = {"allow_untrained": True, "allow_dense": True}
    with attach(model, selector, BUDGET, dense_below=44, **kinds) as run:
        expected = generate(model, ids, max_new_tokens=6)[0]
        eager = run.reset_receipt()
        torch._dynamo.reset()
        assert torch.equal(generate(model, ids, max_new_tokens=6, **settings)[0], expected)
        torch._dynamo.reset()
    assert eager.sparse_calls == 2
    assert run.receipt.dense_reasons["sliding_window"] == eager.dense_reasons["sliding_window"]

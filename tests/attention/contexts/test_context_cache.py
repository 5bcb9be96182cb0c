"""Caches of a context generate what a cache prefilled in this process does, bit for bit."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from hashattn import Budget, Context, HashSelector, HashWeights, Memory, attach, make_selector
from hashattn.attention.cache import GrowingLayer
from hashattn.attention.contexts.layers import layer_record
from hashattn.attention.memory import LayerMemory
from hashattn.attention.stored import StoredLayer
from hashattn.base.errors import UnsupportedModelError
from hashattn.base.repository import repository
from helpers import TracingOracle, generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
READ, ASKED = 40, 7
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 3},
    "drafts": {"prompt_lookup_num_tokens": 3},
}


def hash_selector(model):
    return HashSelector(HashWeights.for_model(model, hidden=16))


def prefilled(model, tokens, chunk=16):
    """A cache of tokens (n,), as any program fills one."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in tokens[None].split(chunk, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def asked(tokens, questions, padding=()):
    """Ids and mask (batch, n) of questions (batch, q) after tokens (n,), padded between the two."""
    batch = len(questions)
    ids = torch.cat([tokens.expand(batch, -1), questions], dim=1)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, len(tokens) : len(tokens) + count] = 0
    return ids, mask


@pytest.fixture
def saved(tmp_path):
    """saved(model, cache, tokens): the context of a cache, saved and loaded again."""

    def through_a_file(model, cache, tokens):
        path = Context.of_cache(model, cache, tokens.tolist()).save(tmp_path / "a.context")
        return Context.load(path, model)

    return through_a_file


def compare(model, saved, batch=1, padding=(), tokens=None, room=64, **settings):
    """Generates from a saved context and from a cache of this process."""
    tokens = prompt(length=READ)[0] if tokens is None else tokens
    ids, mask = asked(tokens, prompt(batch, ASKED, seed=5), padding)
    cache = prefilled(model, tokens)
    context = saved(model, cache, tokens)
    rows = batch * settings.get("num_beams", 1)
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    expected = generate(model, ids, mask, past_key_values=own, **settings)
    loaded = context.cache(rows, room)
    found = generate(model, ids, mask, past_key_values=loaded, **settings)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    again = generate(model, ids, mask, past_key_values=context.cache(rows, room), **settings)
    assert torch.equal(again[0], expected[0])  # the first cache left the context as it was
    return loaded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_dense_generation(family, mode, saved):
    compare(tiny_model(family), saved, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_sparse_generation(family, mode, saved):
    model = tiny_model(family, torch.bfloat16 if family == "mistral" else torch.float32)
    with attach(model, hash_selector(model), SMALL, allow_untrained=True, allow_dense=True) as run:
        compare(model, saved, **MODES[mode])
    assert run.receipt.is_sparse or mode == "drafts"


@pytest.mark.parametrize("sparse", [False, True])
def test_questions_of_several_lengths_in_a_batch(sparse, saved):
    model = tiny_model("llama")
    if not sparse:
        compare(model, saved, batch=3, padding=(0, 4, 2))
        return
    with attach(model, hash_selector(model), SMALL, allow_untrained=True):
        compare(model, saved, batch=3, padding=(0, 4, 2))


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its trained hash selector, and the tokens of some notes."""
    folder = repository() / "data" / "embedded"
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = "Note: Alice visits Kyoto\n" + 40 * "Nothing happens here, and nothing will.\n"
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0]
    return model, HashSelector(HashWeights.load(folder / "hash_weights", model)), tokens


@pytest.mark.parametrize(
    ("mode", "sampled"), [("greedy", 0), ("sampling", 1 / 2), ("beams", 1 / 2)]
)
def test_the_embedded_model(embedded, mode, sampled, saved):
    """By rank and by coins, in bfloat16, questions padded in a batch."""
    model, selector, tokens = embedded
    with attach(model, selector, Budget(density=1 / 8, sampled=sampled)) as run:
        settings = MODES[mode] | {"max_new_tokens": 6}
        compare(model, saved, batch=2, padding=(0, 3), tokens=tokens, **settings)
    assert 0.12 < run.receipt.density < 0.13


@pytest.mark.parametrize("method", ["quest", "snapkv", "h2o", "pqcache"])
def test_other_methods(method, saved):
    """Also those that observe attention, and one whose index is no tensor."""
    model = tiny_model("llama")
    with attach(model, make_selector(method), SMALL):
        compare(model, saved, batch=2)


def test_a_second_turn(saved):
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    with attach(model, hash_selector(model), SMALL, allow_untrained=True):
        own = prefilled(model, tokens)
        answers = []
        for cache in (saved(model, own, tokens).cache(), own):
            ids = tokens[None]
            for turn in (5, 6):
                ids = torch.cat([ids, prompt(length=ASKED, seed=turn)], dim=1)
                ids, logits = generate(model, ids, past_key_values=cache)
            answers.append((ids, logits))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("room", [0, 64])
def test_room_that_runs_out(room, saved):
    """512 rows of 128 bytes are a page: with no room the first new token needs a copy."""
    model = tiny_model("llama")
    loaded = compare(model, saved, tokens=prompt(length=496)[0], room=16 + room)
    grown = loaded.layers[0].pairs.room.shape[2]
    assert grown == 1024 if room else grown > 512


@pytest.mark.parametrize("where", ["layers.can_share", "mapping._map_over"])
def test_where_pages_cannot_be_shared_they_are_copied(where, saved, monkeypatch):
    monkeypatch.setattr(f"hashattn.attention.contexts.{where}", lambda *_: False)
    compare(tiny_model("llama"), saved, batch=2, padding=(0, 3))


def test_what_is_stored_is_what_was_cached(saved):
    """Keys, values and codes of the loaded cache, and their kind of layer."""
    model, tokens = tiny_model("gemma2"), prompt(length=READ)[0]
    with attach(model, hash_selector(model), SMALL, allow_untrained=True, allow_dense=True):
        own = prefilled(model, tokens)
        loaded = saved(model, own, tokens).cache(batch=2)
    for mine, theirs in zip(loaded.layers, own.layers, strict=True):
        for name in ("keys", "values"):
            state = getattr(theirs, name)
            assert torch.equal(getattr(mine, name), state.expand(2, -1, -1, -1))
        assert mine.get_seq_length() == theirs.get_seq_length() == READ
    sliding, full = loaded.layers
    assert not isinstance(sliding, GrowingLayer) and sliding.keys.shape[2] == 15
    codes = [layer.index()["codes"].to_tokens() for layer in (full, own.layers[1])]
    assert torch.equal(codes[0], codes[1].expand(2, -1, -1, -1))


def test_stored_codes_are_used_and_others_made_anew(saved):
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    writer = TracingOracle()
    with attach(model, writer, SMALL, allow_dense=True):
        own = prefilled(model, tokens)
        context = saved(model, own, tokens)
    assert writer.encoded == {0: READ, 1: READ}
    ids, _ = asked(tokens, prompt(1, ASKED, seed=5))
    new = ASKED + 11  # the last of 12 tokens is not read
    for layout, encoded in (("per_query_head", new), ("per_kv_head", READ + new)):
        reader = TracingOracle(layout)
        with attach(model, reader, SMALL):
            generate(model, ids, past_key_values=context.cache())
        assert reader.encoded == {0: encoded, 1: encoded}


def test_a_context_that_was_read_dense_is_encoded_on_first_use(saved):
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    context = saved(model, prefilled(model, tokens), tokens)
    ids, _ = asked(tokens, prompt(1, ASKED, seed=5))
    with attach(model, hash_selector(model), SMALL, allow_untrained=True):
        found = generate(model, ids, past_key_values=context.cache())
        expected = generate(model, ids, past_key_values=prefilled(model, tokens))
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("place", ["host memory", "file"])
def test_with_rows_outside_fast_memory(saved, tmp_path, place):
    """Read into a store, saved from it, and loaded into another one: as without."""
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    ids, _ = asked(tokens, prompt(1, ASKED, seed=5))
    with attach(model, hash_selector(model), SMALL, allow_untrained=True):
        expected = generate(model, ids, past_key_values=prefilled(model, tokens))
    memory = Memory(fast_bytes=2**15, folder=tmp_path if place == "file" else None)
    with attach(model, hash_selector(model), SMALL, memory=memory, allow_untrained=True) as run:
        own = prefilled(model, tokens)
        assert isinstance(own.layers[0], StoredLayer)
        context = saved(model, own, tokens)
        found = generate(model, ids, past_key_values=context.cache())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert run.receipt.is_sparse


def test_rows_in_fewer_bits_are_no_context():
    layer = StoredLayer()
    layer.memory, layer.is_initialized = LayerMemory(Memory(bits=8), 2), True
    with pytest.raises(UnsupportedModelError, match="layer 3 .* in 8 bits.*without Memory.bits"):
        layer_record(3, layer)


def test_a_copied_cache_is_a_cache_of_its_own(saved):
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    cache = saved(model, prefilled(model, tokens), tokens).cache(2)
    twin = copy.deepcopy(cache)
    twin.layers[0].keys.zero_()
    assert cache.layers[0].keys.abs().min() > 0


def test_caches_of_other_kinds_are_refused():
    model, tokens = tiny_model("llama"), prompt(length=READ)[0]
    static = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(tokens[None], past_key_values=static)
    with pytest.raises(UnsupportedModelError, match="StaticLayer, of which no context"):
        Context.of_cache(model, static, tokens.tolist())
    cache = prefilled(model, tokens)
    with pytest.raises(ValueError, match="tokens = 39: must be the cache's 40"):
        Context.of_cache(model, cache, tokens.tolist()[1:])
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="batch = 2: must be 1: a context is one sequence"):
        Context.of_cache(model, cache, tokens.tolist())

"""What selectors remember of attention: kept beside the cache, and moved with it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hashattn import Budget, attach
from hashattn.base.errors import AttachmentError
from hashattn.selectors import make_selector
from hashattn.selectors.base import Selector
from hashattn.selectors.oracle import OracleSelector
from helpers import generate, left_padded, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
METHODS = {
    "h2o": {},
    "snapkv": {"window": 4, "kernel": 3},
    "infllm": {"block": 4, "representatives": 2, "window": 8},
}
SAME = {"rtol": 0, "atol": 1e-5}


class Witness(OracleSelector):
    """Remembers of every token a mark of its key and the calls since: easy to check anywhere."""

    observes = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def observe(self, layer, queries, view, scaling, read=None):
        self.calls.append((layer, queries.shape[2], None if read is None else read.shape[2]))
        before = view.index.get("age", view.keys.new_zeros(*view.keys.shape[:2], 0))
        new = view.keys.shape[2] - before.shape[2]
        assert new == queries.shape[2]
        age = torch.cat([before + 1, before.new_zeros(*before.shape[:2], new)], dim=2)
        return {"mark": view.keys[..., 0].clone(), "age": age}

    def scores(self, layer, queries, view, scaling):
        known = view.keys[:, :, : -queries.shape[2], 0]
        assert torch.equal(view.index["mark"], known) and view.index["age"].shape == known.shape
        return super().scores(layer, queries, view, scaling)


def selectors():
    return [pytest.param(name, settings, id=name) for name, settings in METHODS.items()]


def run(model, cache, *parts, mask=None):
    """Feed token ids (batch, q) one part after the other; the last logits."""
    for ids in parts:
        seen = None if mask is None else mask[:, : cache.get_seq_length() + ids.shape[1]]
        out = model(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True)
    return out.logits[:, -1]


@torch.no_grad()
def observed(model, selector, *parts, mask=None):
    cache = DynamicCache(config=model.config)
    with attach(model, selector, SMALL, allow_dense=True):
        run(model, cache, *parts, mask=mask)
    return cache


@torch.no_grad()
def test_every_call_is_observed_once_with_what_it_read():
    model, witness = tiny_model("llama"), Witness()
    ids = prompt(length=20)
    observed(model, witness, ids[:, :10], ids[:, 10:18], ids[:, 18:19], ids[:, 19:])
    layer = [call[1:] for call in witness.calls if call[0] == 1]
    assert layer == [(10, None), (8, None), (1, 1), (1, 1)]


def test_others_are_never_asked(monkeypatch):
    def refuse(*args):
        raise AssertionError("observe was called")

    monkeypatch.setattr(Selector, "observe", refuse)
    cache = observed(tiny_model("llama"), OracleSelector(), prompt(), prompt(length=1))
    assert cache.layers[0].observed is None


def test_dense_and_sliding_layers_observe_nothing():
    model, witness = tiny_model("gemma2"), Witness()
    observed(model, witness, prompt())
    assert {call[0] for call in witness.calls} == {1}
    model, witness = tiny_model("llama"), Witness()
    with attach(model, witness, SMALL, dense_layers=[0]):
        generate(model, prompt())
    assert {call[0] for call in witness.calls} == {1}


@pytest.mark.parametrize(("name", "settings"), selectors())
def test_chunks_of_a_prompt_leave_the_same_state_as_the_whole(name, settings):
    model, ids = tiny_model("llama"), prompt(batch=2)
    selector = make_selector(name, **settings)
    whole = observed(model, selector, ids)
    chunks = observed(model, selector, *ids.split(7, dim=1))
    for one, other in zip(whole.layers, chunks.layers, strict=True):
        assert one.observed.keys() == other.observed.keys() != set()
        for part in one.observed:
            torch.testing.assert_close(one.observed[part], other.observed[part], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), selectors())
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padding_does_not_change_what_is_read(family, name, settings):
    model, selector = tiny_model(family), make_selector(name, **settings)
    ids, mask = left_padded((40, 33, 17))
    with attach(model, selector, SMALL):
        together = generate(model, ids, mask)[1]
    for row, length in enumerate((40, 33, 17)):
        with attach(model, selector, SMALL):
            alone = generate(model, ids[row : row + 1, 40 - length :])[1]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), selectors())
@pytest.mark.parametrize(
    "way", [{"prefill_chunk_size": 8}, {"cache_implementation": "static"}], ids=["chunks", "static"]
)
def test_the_kind_of_cache_does_not_change_what_is_read(name, settings, way):
    model, selector = tiny_model("llama"), make_selector(name, **settings)
    ids, mask = left_padded()
    logits = []
    for how in ({}, way):
        with attach(model, selector, SMALL) as attached:
            logits.append(generate(model, ids, mask, **how)[1])
        assert attached.receipt.density < 0.5
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_state_follows_beams_and_rejected_drafts(way):
    model, witness = tiny_model("llama"), Witness()
    with attach(model, witness, SMALL, sparse_rows=4):
        generate(model, prompt(batch=2 if "num_beams" in way else 1), **way)
    assert any(read is not None for _, _, read in witness.calls)  # Witness.scores checked its state


@pytest.mark.parametrize(("name", "settings"), selectors())
@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_methods_run_with_beams_and_drafts(way, name, settings):
    model, selector = tiny_model("llama"), make_selector(name, **settings)
    with attach(model, selector, SMALL, sparse_rows=4) as attached:
        generate(model, prompt(), **way)
    assert attached.receipt.is_sparse


@torch.no_grad()
def test_state_follows_the_batch_and_the_length():
    model, ids = tiny_model("llama"), prompt(batch=2)
    cache = observed(model, Witness(), ids)
    layer = cache.layers[0]
    before = layer.keys.clone()
    copied = copy.deepcopy(cache).layers[0]

    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.observed["mark"], before[[1, 0]][..., 0])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.observed["mark"], before[[1, 1, 0, 0]][..., 0])
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.observed["mark"], before[[1, 0]][..., 0])
    cache.crop(-5)
    assert layer.observed_length == 35
    assert torch.equal(layer.observed["mark"], before[[1, 0], :, :35, 0])
    assert torch.equal(copied.observed["mark"], before[..., 0])
    layer.reset()
    assert layer.observed is None and layer.observed_length == 0


@pytest.mark.parametrize(("name", "settings"), selectors())
@torch.no_grad()
def test_cropped_tokens_are_forgotten(name, settings):
    """A prompt cut back goes on with the tokens that follow."""
    model, selector, ids = tiny_model("llama"), make_selector(name, **settings), prompt()
    cache = observed(model, selector, ids)
    cache.crop(-8)
    with attach(model, selector, SMALL, allow_dense=True):
        run(model, cache, ids[:, 32:36], ids[:, 36:37])
    assert all(layer.observed_length == 37 for layer in cache.layers)
    assert all(part.shape[2] == 37 for part in cache.layers[0].observed.values())


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@torch.no_grad()
def test_evicted_tokens_never_return(name):
    model, selector = tiny_model("llama"), make_selector(name, **METHODS[name])
    part = {"h2o": "gathered", "snapkv": "rank"}[name]
    ids, cache, evicted = prompt(length=60), DynamicCache(), None
    with attach(model, selector, SMALL):
        run(model, cache, ids[:, :40])
        assert not cache.layers[0].observed[part].isinf().any()
        for token in range(40, 52):
            run(model, cache, ids[:, token : token + 1])
            gone = cache.layers[0].observed[part].isinf()
            if evicted is not None:
                assert gone[..., : evicted.shape[2]][evicted].all()
            assert ((~gone).sum(dim=-1) <= SMALL.total(token + 1)).all()
            evicted = gone
        run(model, cache, ids[:, 52:])  # a dense call of the next turn
        gone = cache.layers[0].observed[part].isinf()
        assert torch.equal(gone[..., :52], evicted) and not gone[..., 52:].any()


@torch.no_grad()
def test_a_cache_whose_prefill_was_not_seen_is_refused():
    model, ids, cache = tiny_model("llama"), prompt(), DynamicCache()
    run(model, cache, ids[:, :30])
    with attach(model, make_selector("h2o"), SMALL, allow_dense=True):
        for tokens in (ids[:, 30:31], ids[:, 30:]):
            with pytest.raises(AttachmentError, match=r"30 tokens .* saw 0: attach it before"):
                run(model, copy.deepcopy(cache), tokens)


@torch.no_grad()
def test_another_selector_starts_anew():
    model, ids = tiny_model("llama"), prompt()
    cache = observed(model, make_selector("h2o"), ids)
    with (
        attach(model, make_selector("infllm"), SMALL, allow_dense=True),
        pytest.raises(AttachmentError, match="infllm"),
    ):
        run(model, cache, ids[:, :1])


@torch.no_grad()
def test_wrong_shapes_are_refused():
    class Short(Witness):
        def observe(self, layer, queries, view, scaling, read=None):
            return {"mark": view.keys[:, :, 1:, 0]}

    with pytest.raises(ValueError, match="observe returned 'mark' of shape"):
        observed(tiny_model("llama"), Short(), prompt())


@torch.no_grad()
def test_h2o_remembers_the_models_own_attention():
    """The state equals the column sums of the weights that the eager model returns."""
    model, ids = tiny_model("llama"), prompt(batch=2)
    cache = observed(model, make_selector("h2o"), ids)
    eager = tiny_model("llama", attention="eager")
    for layer, weights in zip(cache.layers, eager(ids, output_attentions=True).attentions,
                              strict=True):  # fmt: skip
        expected = weights.double().sum(dim=2).unflatten(1, (2, -1)).mean(dim=2)
        assert (layer.observed["gathered"] - expected).abs().max() < 1e-4

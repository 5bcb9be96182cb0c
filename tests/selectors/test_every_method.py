"""What holds for every method that can be made: padding anywhere, and bits that are stored."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hashattn import Budget, attach
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import Codes
from hashattn.selectors import METHODS, make_selector
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.pqcache import ProductCodes
from helpers import prompt, tiny_model

LAYERS, HEADS, KV_HEADS, D = (0, 1), 4, 2, 16  # of tiny_model("llama")
BUDGET = Budget(sink=1, local=2, heavy=5)
ANY = {"allow_untrained": True}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def grids(channels: int) -> dict[int, Tensor]:
    """Of 2^4 points and more from -2 on."""
    return {layer: torch.tensor([-2.0, 0.25])[None, :, None].expand(KV_HEADS, 2, channels)
            for layer in LAYERS}  # fmt: skip


def settings(name: str) -> dict:
    """Small settings, so that every part of a method has work on two dozen tokens."""
    every = {
        "hash": lambda: {"weights": HashWeights.random(
            HashConfig(LAYERS, HEADS, KV_HEADS, D, "per_kv_head", 32, depth=2, hidden=16), 0)},
        "transform": lambda: {"weights": HashWeights.random(
            HashConfig(LAYERS, HEADS, KV_HEADS, D, bits=32, depth=1, folds=2), 0)},
        "rabitq": lambda: {"weights": HashWeights.random(
            HashConfig(LAYERS, HEADS, KV_HEADS, D, bits=64, depth=1, folds=1), 0), "factor": True},
        "hata": lambda: {"weights": {layer: random(KV_HEADS, D, 32) for layer in LAYERS},
                         "key_norm": True},
        "double_sparsity": lambda: {"channels": {
            layer: torch.arange(3).expand(HEADS, 3) for layer in LAYERS}},
        "loki": lambda: {"basis": {layer: random(KV_HEADS, D, 5) for layer in LAYERS},
                         "bits": 8, "grids": grids(5)},
        "oracle": lambda: {"value_norms": True},
        "quest": lambda: {"page": 3, "bits": 4, "grids": grids(D)},
        "snapkv": lambda: {"window": 4, "kernel": 3},
        "infllm": lambda: {"block": 4, "representatives": 2, "window": 8},
        "socket": lambda: {"tables": 6, "hyperplanes": 3, "value_norms": True},
        "magicpig": lambda: {"bits": 2, "tables": 6},
        "sparq": lambda: {"channels": 5},
        "pqcache": lambda: {"parts": 2, "bits": 2, "sink": 1},
        "rerank": lambda: {"base": make_selector("lsh"), "factor": 2, "value_norms": True},
        "residual": lambda: {"base": make_selector("snapkv", window=4, kernel=3)},
        "certified": lambda: {"base": make_selector("lsh"), "bits": 4, "tolerance": 0.3},
    }  # fmt: skip
    return every.get(name, dict)()


def made(name: str) -> Selector:
    return make_selector(name, **settings(name))


def answers(model, selector, parts: list[Tensor], masks: list[Tensor], rows: int) -> Tensor:
    """Logits (batch, parts, vocabulary) behind each part of token ids (batch, q)."""
    seen, found = torch.zeros(len(parts[0]), 0, dtype=torch.long), []
    with torch.no_grad(), attach(model, selector, BUDGET, sparse_rows=rows, **ANY):
        cache = DynamicCache(config=model.config)
        for ids, mask in zip(parts, masks, strict=True):
            seen = torch.cat([seen, mask], dim=1)
            positions = (seen.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)


def padded(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    ids = prompt(len(lengths), max(lengths), seed=seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids * mask, mask


@pytest.mark.parametrize("rows", [1, 9], ids=["dense_question", "sparse_question"])
@pytest.mark.parametrize("name", METHODS)
def test_a_padded_question_behind_a_padded_prefix_is_each_row_alone(name, rows):
    """A hole in what a row sees, into which falls who counts from the first visible token."""
    model = tiny_model("llama")
    lengths = [(24, 15, 24), (9, 4, 6), (1, 1, 1), (1, 1, 1), (5, 2, 5), (1, 1, 1)]
    parts, masks = zip(*(padded(n, seed) for seed, n in enumerate(lengths)), strict=True)
    together = answers(model, made(name), parts, masks, rows)
    for row in range(3):
        own = [part[row : row + 1, -n[row] :] for part, n in zip(parts, lengths, strict=True)]
        alone = answers(model, made(name), own, [torch.ones_like(part) for part in own], rows)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_auxiliary_bits_are_what_the_cache_holds(name):
    """The receipt states what is stored, not what the method's authors would store."""
    model, selector = tiny_model("llama"), made(name)
    with torch.no_grad(), attach(model, selector, BUDGET, **ANY) as run:
        cache = DynamicCache(config=model.config)
        for ids in prompt(2, 30).split((28, 1, 1), dim=1):
            model(ids, past_key_values=cache)
    layer = cache.layers[1]
    stored = [held(store) for store in (getattr(layer, "stores", None) or {}).values()]
    stored += (getattr(layer, "observed", None) or {}).values()
    assert all(part.shape[2] == 30 for part in stored)
    bits = sum(8 * part.element_size() * part.numel() for part in stored) / (2 * KV_HEADS * 30)
    assert selector.auxiliary_bits(HEADS // KV_HEADS, D) == bits
    if selector.sparse:
        assert run.receipt.auxiliary_bits == bits
        assert run.receipt.nominal_bits == selector.nominal_bits(HEADS // KV_HEADS, D)


def held(store) -> Tensor:
    if isinstance(store, ProductCodes):
        return store.codes
    return store.to_tokens() if isinstance(store, Codes) else store.value


def test_methods_that_compute_their_index_anew_store_nothing():
    for name, nominal in (("quest", 256), ("sparq", 2048)):
        selector = make_selector(name)
        assert selector.auxiliary_bits(4, 128) == 0 and selector.nominal_bits(4, 128) == nominal
    assert make_selector("rerank", base=make_selector("quest")).nominal_bits(4, 128) == 256
    wide = make_selector("socket", tables=60, hyperplanes=12)  # buckets of two bytes
    assert (wide.auxiliary_bits(4, 128), wide.nominal_bits(4, 128)) == (960, 720)


class Uniform(Selector):
    """A second dense baseline, that says nothing about kernels."""

    name, sparse = "uniform", False

    def scores(self, layer, queries, view: KeyView, scaling) -> Tensor:
        raise AssertionError("nothing is chosen")


class UniformByKernel(Uniform):
    kernel = True


@pytest.mark.parametrize("selector", [Uniform(), UniformByKernel()])
def test_any_method_may_be_dense(selector):
    model, ids = tiny_model("llama"), prompt(length=20)
    parts = [ids[:, :18], ids[:, 18:19], ids[:, 19:]]
    masks = [torch.ones_like(part) for part in parts]
    with torch.no_grad():
        expected = model(ids).logits[0, 17:]
    found = answers(model, selector, parts, masks, 1)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

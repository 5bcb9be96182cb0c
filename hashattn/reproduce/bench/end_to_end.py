"""Decoding of whole Hugging Face models from a long cache, and attention's share of the time.

The cache is filled with random keys and values, not by a prefill: a token costs the same. The most
that a faster attention can gain is 1 / (1 - its share): the ceiling beside every speed-up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.attention.observer import LayerStep
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.bench.record import protocol_of
from hashattn.reproduce.bench.timing import spread
from hashattn.selectors.dense import DenseSelector
from hashattn.selectors.hash import HashSelector

ROWS_AT_ONCE = 4096  # tokens of random cache drawn at a time: float32 copies stay small
STOCK, TIMED = "sdpa", "hashattn_timed_sdpa"
STAGES = ("encode", "select", "attend")

# shapes as in the models' config.json; the weights are random
LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    max_position_embeddings=131072,
)  # fmt: skip
TWO_LAYERS_OF_8B = dict(
    vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip


def random_llama(shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A Llama of this shape with random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def filled_cache(model: PreTrainedModel, n: int, seed: int = 0) -> DynamicCache:
    """A DynamicCache whose layers hold random K and V (1, KV heads, n, D) in the model's dtype."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, n, config.head_dim)
        states = torch.empty(shape, dtype=model.dtype)
        for start in range(0, n, ROWS_AT_ONCE):
            part = states[:, :, :, start : start + ROWS_AT_ONCE]
            part.copy_(torch.randn(part.shape, generator=generator))
        cache.update(states[0], states[1], layer)
    return cache


@torch.no_grad()
def model_latency(
    name: str, model: PreTrainedModel, n: int, budget: Budget, steps: int = 6, seed: int = 0,
    depth: int = 2, hidden: int = 128,
) -> list[dict[str, Any]]:  # fmt: skip
    """Milliseconds of one token with n cached ones, a row for each way to attend.

    Variants: "transformers" (the model as it comes: SDPA, a cache that concatenates), "dense" (this
    package's dense kernel and cache), "hash". Columns ms (median of `steps` tokens after a first),
    q1, q3, attention_ms (median), attention_share, ceiling (1 / (1 - share): the most that any
    attention could gain over this variant), density (counted), encode_ms, select_ms and attend_ms
    (of "hash", medians over layers and tokens, with the processor's caches as a real step leaves
    them), and the protocol.
    """
    weights = HashWeights.for_model(model, seed=seed, depth=depth, hidden=hidden).rounded()
    selectors = {
        "transformers": None,
        "dense": DenseSelector(kernel=True),
        "hash": HashSelector(weights, "hamming", "per_kv_head"),
    }
    protocol = protocol_of("wall", seed) | {
        "model": name, "parameters": model.num_parameters(), "n": n, "steps": steps,
        "dtype": str(model.dtype).removeprefix("torch."), "bits": weights.config.bits,
        "depth": depth, "hidden": hidden, "sink": budget.sink, "local": budget.local,
        "heavy": budget.heavy, "layers": model.config.num_hidden_layers,
    }  # fmt: skip
    rows = []
    for variant, selector in selectors.items():
        cache = filled_cache(model, n, seed)
        spent, density = _decode(model, cache, selector, budget, steps)
        del cache
        total, attention = spread(spent["token"]), median(spent["attention"]) * 1e3
        share = attention / total["ms"]
        stages = {f"{name}_ms": median(spent[name]) * 1e3 for name in STAGES if spent[name]}
        rows.append({"variant": variant, **total, "attention_ms": attention,
                     "attention_share": share, "ceiling": 1 / (1 - share), "density": density,
                     **stages, **protocol})  # fmt: skip
    return rows


class StageTimes:
    """Listens to an attached model: seconds of attention and of its stages, one entry per layer."""

    timed = True

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {name: [] for name in ("attention", *STAGES)}

    def saw(self, step: LayerStep) -> None:
        """Note a layer's times; those of stages only where the call was sparse."""
        self.spent["attention"].append(step.seconds["total"])
        if step.reason is None:
            for name in STAGES:
                self.spent[name].append(step.seconds[name])


def _decode(
    model: PreTrainedModel, cache: DynamicCache, selector: Any, budget: Budget, steps: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every token, of the attention in it and of its stages; the counted density.

    The first token is left out: it encodes the cache and warms up.
    """
    token = torch.zeros(1, 1, dtype=torch.long)
    spent: dict[str, list[float]] = {name: [] for name in ("token", "attention", *STAGES)}

    def run(times: StageTimes) -> None:
        for number in range(steps + 1):
            for seconds in times.spent.values():
                seconds.clear()
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            token_seconds = time.perf_counter() - start
            if number:
                spent["token"].append(token_seconds)
                spent["attention"].append(sum(times.spent["attention"]))
                for name in STAGES:
                    spent[name] += times.spent[name]

    if selector is None:
        with _timed_stock(model) as times:
            run(times)
        return spent, 1.0
    with (
        attach(model, selector, budget, allow_dense=True, allow_untrained=True) as attached,
        attached.listen(StageTimes()) as times,
    ):
        run(times)
    return spent, attached.receipt.decode_density


@contextmanager
def _timed_stock(model: PreTrainedModel) -> Iterator[StageTimes]:
    """The model's own attention under another name, each call timed."""
    times, interface = StageTimes(), AttentionInterface()
    stock = interface[STOCK]

    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = stock(*arguments, **keywords)
        times.spent["attention"].append(time.perf_counter() - start)
        return result

    before = model.config._attn_implementation
    AttentionInterface.register(TIMED, timed)
    AttentionMaskInterface.register(TIMED, sdpa_mask)
    model.set_attn_implementation(TIMED)
    try:
        yield times
    finally:
        model.set_attn_implementation(before)

"""`generate` of whole Hugging Face models from a long cache: time a token, and where it goes.

The cache is filled with random keys and values, not by a prefill: a token costs the same. The most
that a faster attention can gain is 1 / (1 - its share): the ceiling beside every speed-up. Host
time, Python's and torch's around the kernels, is told apart from the kernels' own: on a CPU inside
attention, on a GPU as what a token takes beyond the device's work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from statistics import median
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.attention.observer import LayerStep
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import available
from hashattn.reproduce.bench.record import protocol_of
from hashattn.reproduce.bench.timing import spread
from hashattn.reproduce.bench.ways import WAYS
from hashattn.selectors.base import Selector
from hashattn.selectors.dense import DenseSelector
from hashattn.selectors.hash import HashSelector

ROWS_AT_ONCE = 4096  # tokens of random cache drawn at a time: float32 copies stay small
STOCK, TIMED = "sdpa", "hashattn_timed_sdpa"
TIMED_WAYS = ("default", "default_kv_lists", "paper_kv_lists")
_CPU_BACKENDS = ("numba_cpu", "numpy_cpu")
_KERNELS = ("decode_step", "dense_decode", "encode", "encode_pair", "encode_graded", "grade_bits",
            "select", "select_by_codes", "sample_by_codes", "attend")  # fmt: skip

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
    config, generator = model.config, torch.Generator(model.device).manual_seed(seed)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, n, config.head_dim)
        states = torch.empty(shape, dtype=model.dtype, device=model.device)
        for start in range(0, n, ROWS_AT_ONCE):
            part = states[:, :, :, start : start + ROWS_AT_ONCE]
            part.copy_(torch.randn(part.shape, generator=generator, device=model.device))
        cache.update(states[0], states[1], layer)
    return cache


def static_cache(model: PreTrainedModel, cache: DynamicCache, room: int) -> StaticCache:
    """A StaticCache with the tokens of `cache` and room for as many more."""
    static = StaticCache(config=model.config, max_cache_len=cache.get_seq_length() + room)
    for number, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, number)
    return static


def selectors(
    model: PreTrainedModel, seed: int = 0, names: Iterable[str] = TIMED_WAYS
) -> dict[str, Selector | None]:
    """The ways to attend that are timed: None for the model's own attention, ours dense, and the
    ways of `names` with random maps."""
    found: dict[str, Selector | None] = {
        "transformers": None, "dense": DenseSelector(kernel=model.device.type == "cpu"),
    }  # fmt: skip
    for name in names:
        way = WAYS[name]
        weights = HashWeights.for_model(model, seed=seed, **way.codes).rounded()
        found[name] = HashSelector(weights, way.scoring, way.layout)
    return found


@torch.no_grad()
def model_latency(
    name: str, model: PreTrainedModel, n: int, budget: Budget, steps: int = 6, seed: int = 0,
    ways: Mapping[str, Selector | None] | None = None, static: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Milliseconds of one token of `generate` with n cached ones, a row for each way to attend.

    Variants: "transformers" (the model as it comes: SDPA, a cache that concatenates), "dense" (this
    package's dense kernel and cache), and sparse ones (`selectors`). Columns ms (median of `steps`
    tokens after a first), q1, q3, density (counted), cache, and the protocol. On a CPU also
    attention_ms (median of a token), attention_share, ceiling (1 / (1 - share): the most that any
    attention could gain over this variant), and of our own variants kernel_ms and host_ms:
    attention inside the backend's functions, and around them. On a GPU device_ms, what its kernels
    take, and host_ms, the rest of a token, in which the device waits. static: a StaticCache, which
    `generate` compiles for on a GPU.
    """
    ways = selectors(model, seed) if ways is None else ways
    protocol = protocol_of("wall", seed) | {
        "model": name, "parameters": model.num_parameters(), "n": n, "steps": steps,
        "dtype": str(model.dtype).removeprefix("torch."), "sink": budget.sink,
        "local": budget.local, "heavy": budget.heavy, "density_asked": budget.density,
        "layers": model.config.num_hidden_layers, "cache": "static" if static else "dynamic",
    }  # fmt: skip
    filled, rows = filled_cache(model, n, seed), []
    for variant, selector in ways.items():
        cache = static_cache(model, filled, steps + 2) if static else copy.deepcopy(filled)
        measured = _decode(model, cache, selector, budget, n, steps)
        del cache
        rows.append({"variant": variant, **measured, **protocol})
    return rows


class AttentionTimes:
    """Listens to an attached model: seconds of every attention call."""

    timed = True

    def __init__(self) -> None:
        self.spent: list[float] = []

    def saw(self, step: LayerStep) -> None:
        """Note a layer's time."""
        self.spent.append(step.seconds["total"])


class _Ticks(BaseStreamer):
    """When `generate` gave each token, and what else was spent until then."""

    def __init__(self, **spent: list[float]) -> None:
        self.times: list[float] = []
        self.spent = spent
        self.until: dict[str, list[float]] = {name: [] for name in spent}

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        for name, seconds in self.spent.items():
            self.until[name].append(sum(seconds))
            seconds.clear()

    def end(self) -> None:
        pass

    def tokens(self) -> list[float]:
        """Seconds of every token but the first, which encodes the cache and warms up."""
        return [end - start for start, end in zip(self.times[1:], self.times[2:], strict=False)]


def _decode(
    model: PreTrainedModel, cache: Cache, selector: Selector | None, budget: Budget, n: int,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """What `steps` tokens after a first took."""
    kernels: list[float] = []
    with _attended(model, selector, budget) as (attention, receipt):
        on_cpu = model.device.type == "cpu"
        with timed_kernels(kernels) if on_cpu else nullcontext():
            ticks = _Ticks(attention=attention, kernels=kernels)
            _generate(model, cache, n, steps + 1, ticks)
        found: dict[str, Any] = spread(ticks.tokens())
        found["density"] = receipt().decode_density if receipt else 1.0
        if on_cpu:
            spent = {name: median(sums[2:]) * 1e3 for name, sums in ticks.until.items()}
            share = spent["attention"] / found["ms"]
            inside = spent["kernels"] if selector is not None else None
            return found | {
                "attention_ms": spent["attention"], "attention_share": share,
                "ceiling": 1 / (1 - share), "kernel_ms": inside,
                "host_ms": None if inside is None else spent["attention"] - inside,
            }  # fmt: skip
        device = _device_seconds(model, cache, n + steps + 1) * 1e3
        return found | {"device_ms": device, "host_ms": max(0.0, found["ms"] - device)}


@torch.no_grad()
def token_seconds(
    model: PreTrainedModel, filled: DynamicCache, selector: Selector | None, budget: Budget,
    n: int, steps: int,
) -> list[float]:  # fmt: skip
    """Seconds of `steps` tokens of `generate` after a first, from a copy of a cache of n tokens."""
    ticks, cache = _Ticks(), copy.deepcopy(filled)
    with _attended(model, selector, budget, listening=False):
        _generate(model, cache, n, steps + 1, ticks)
    return ticks.tokens()


def _generate(
    model: PreTrainedModel, cache: Cache, n: int, tokens: int, streamer: BaseStreamer | None = None
) -> None:
    """`tokens` more tokens after n cached ones."""
    ids = torch.zeros(1, n + 1, dtype=torch.long, device=model.device)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, streamer=streamer, pad_token_id=0,
    )  # fmt: skip


@contextmanager
def _attended(
    model: PreTrainedModel, selector: Selector | None, budget: Budget, listening: bool = True
) -> Iterator[tuple[list[float], Callable | None]]:
    """The model with a way to attend: the list that fills with seconds of its attention calls (on a
    CPU, where asking does not wait for a device), and how to get the receipt."""
    listening = listening and model.device.type == "cpu"
    if selector is None:
        with _timed_stock(model) if listening else nullcontext([]) as spent:
            yield spent, None
        return
    listener = AttentionTimes()
    with (
        attach(
            model, selector, budget, allow_dense=True, allow_untrained=True, dense_below=0
        ) as attached,
        attached.listen(listener) if listening else nullcontext(),
    ):
        yield listener.spent, lambda: attached.receipt


@contextmanager
def timed_kernels(spent: list[float]) -> Iterator[None]:
    """While it lasts, `spent` gets the seconds of every call of a CPU backend's kernel."""
    inside, before = [0], []

    def timed(kernel: Callable) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            inside[0] += 1
            try:
                return kernel(*arguments, **keywords)
            finally:
                inside[0] -= 1
                if not inside[0]:  # a kernel may call another
                    spent.append(time.perf_counter() - start)

        return call

    names = [name for name in _CPU_BACKENDS if name != "numba_cpu" or available("numba")]
    for module in (import_module(f"hashattn_kernels.{name}") for name in names):
        before += [(module, name, vars(module)[name]) for name in _KERNELS if name in vars(module)]
    for module, name, kernel in before:
        setattr(module, name, timed(kernel))
    try:
        yield
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)


def _device_seconds(model: PreTrainedModel, cache: Cache, n: int, tokens: int = 3) -> float:
    """Seconds of a token's kernels on a GPU, by torch's profiler; the cache goes on growing."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        _generate(model, cache, n, tokens)
    busy = sum(event.self_device_time_total for event in trace.key_averages())
    return busy / 1e6 / tokens


@contextmanager
def _timed_stock(model: PreTrainedModel) -> Iterator[list[float]]:
    """The model's own attention under another name, each call timed."""
    spent, interface = [], AttentionInterface()
    stock = interface[STOCK]

    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = stock(*arguments, **keywords)
        spent.append(time.perf_counter() - start)
        return result

    before = model.config._attn_implementation
    AttentionInterface.register(TIMED, timed)
    AttentionMaskInterface.register(TIMED, sdpa_mask)
    model.set_attn_implementation(TIMED)
    try:
        yield spent
    finally:
        model.set_attn_implementation(before)

"""What a decode step of one layer takes on this machine: the model's own attention, and sparse.

Timed is what attach changes in a layer: the cache's update and the attention function, the same
code that decoding runs, with batch 1 and a cache of random keys and values. The arguments are those
that the model itself passes, so its scaling, caps and sinks count. What the processor's caches hold
is what they hold in a model: a step ago this layer's keys, one layer ago the code that runs, and in
between a layer's weights. Projections and the rest of the model, which cost both alike, are left
out; so are the hooks' few microseconds a layer, and what torch.compile or a CUDA graph would save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import cycle
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashattn.attention.break_even import BreakEven, StepTimes
from hashattn.attention.cache import indexed_layer
from hashattn.attention.dispatch import forward
from hashattn.attention.finite import FiniteWatch
from hashattn.attention.inputs import Inputs
from hashattn.attention.run import CALL, LayerCall, SparseRun
from hashattn.base.environment import device_name
from hashattn.base.errors import UnsupportedModelError
from hashattn.models.dense import dense_attention
from hashattn.models.families import max_positions
from hashattn.models.structure import text_config
from hashattn.models.support import set_text_attention

_PROBE = "hashattn_probe"  # of the attention function that finds out what the model passes
_LONGEST = {"cpu": 4096, "cuda": 65536}  # cached tokens that are timed at most
_ROUNDS = 15  # samples of each length and way, after one that warms up
_LEAST_ROUNDS = 3
_SECONDS = 3.0  # after which no round begins, beyond the least
_CALLS = {"cpu": 1, "cuda": 8}  # of a sample: on a GPU the host runs ahead, as it does in a model
_QUERIES = 4  # in rotation, so that no selection is still cached from the last sample
_FLUSH_BYTES = 100 << 20  # above what processors cache
_TOKENS_BEFORE = 64  # cached in the layer that is run, not timed, before every sample
_MEASURED: WeakKeyDictionary[nn.Module, dict[str, BreakEven]] = WeakKeyDictionary()


def break_even(model: PreTrainedModel, run: SparseRun) -> BreakEven:
    """The break-even of a run's method; measured once a process for what it depends on.

    run: made for this measurement, of a sparse method that does not observe. A few seconds.
    """
    layer = min(run.full_layers - run.dense_layers)
    protocol = _protocol(model, run, layer)
    known = _MEASURED.setdefault(model, {})
    key = json.dumps(protocol | {"positions": max_positions(model.config)}, sort_keys=True)
    if key not in known:
        known[key] = _measured(model, run, layer, protocol)
    return known[key]


def _protocol(model: PreTrainedModel, run: SparseRun, layer: int) -> dict[str, Any]:
    """What the times depend on, JSON-able."""
    return {
        "device": device_name(), "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."), "batch": 1, "layer": layer,
        "dense": text_config(model)._attn_implementation, "method": run.selector.record(),
        "budget": asdict(run.budget), "flush_bytes": _FLUSH_BYTES,
        "fallback": None if run.fallback is None else run.fallback.record(),
    }  # fmt: skip


@torch.no_grad()
def _measured(
    model: PreTrainedModel, run: SparseRun, layer: int, protocol: dict[str, Any]
) -> BreakEven:
    begin, longest = time.perf_counter(), max_positions(model.config)
    inputs = _probed(model, layer)
    kind = "cpu" if inputs.query.is_cpu else "cuda"
    most = min(_LONGEST[kind], longest or _LONGEST[kind])
    lengths = tuple(sorted({max(1, most // part) for part in (16, 4, 1)}))
    half = _ROUNDS * _CALLS[kind] // 2  # every call adds a token: a median is of about n
    steps = {n: _Step(model, run, layer, inputs, n - half) for n in lengths}
    other = max(run.full_layers - run.dense_layers)  # has hash maps of its own
    before = _Step(model, run, other, inputs, _TOKENS_BEFORE)
    ways = {("dense", n): (before.dense, step.dense) for n, step in steps.items()}
    ways |= {("sparse", n): (before.sparse, step.sparse) for n, step in steps.items()}
    weights = sum(p.nbytes for p in model.parameters()) // text_config(model).num_hidden_layers
    samples = _seconds_of(ways, inputs.query.device, _CALLS[kind], min(weights, _FLUSH_BYTES))
    dense, sparse = (
        StepTimes.of(lengths, [samples[way, n] for n in lengths]) for way in ("dense", "sparse")
    )
    rounds = len(samples["dense", lengths[0]])
    took = {"rounds": rounds, "calls": _CALLS[kind], "seconds": time.perf_counter() - begin}
    return BreakEven(lengths, dense, sparse, longest, protocol | took)


def _seconds_of(
    ways: dict[Any, tuple[Callable[[], Any], Callable[[], Any]]], device: torch.device, calls: int,
    weights: int,
) -> dict[Any, list[float]]:  # fmt: skip
    """Seconds of a call of the second of each of `ways`, sample by sample.

    Before it the caches are emptied, the first is called, and `weights` bytes are read. Every round
    samples each way once, so that what else the machine does meets all alike; a first round warms
    up. Rounds end after _SECONDS.
    """
    samples: dict[Any, list[float]] = {name: [] for name in ways}
    flushed = torch.ones(_FLUSH_BYTES // 4, device=device)
    begin = time.perf_counter()
    for number in range(-1, _ROUNDS):
        if number == 0:
            begin = time.perf_counter()  # the first round may have compiled kernels
        if number >= _LEAST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        for name, (before, timed) in ways.items():
            flushed.sum()
            before()
            flushed[: weights // 4].sum()
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                timed()
            _wait(device)
            if number >= 0:
                samples[name].append((time.perf_counter() - start) / calls)
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Found(Exception):
    """Carries the arguments of the attention function out of a running model."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


def _probed(model: PreTrainedModel, layer: int) -> Inputs:
    """What the model passes to the attention function of a layer for one token."""
    previous = text_config(model)._attn_implementation

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        inputs = Inputs(module, query, key, value, None, scaling, dropout, kwargs)
        if module.layer_idx == layer:
            raise _Found(inputs)
        return inputs.dense(eager=previous == "eager")

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    set_text_attention(model, _PROBE)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    except _Found as found:
        return found.inputs
    finally:
        set_text_attention(model, previous)
    raise UnsupportedModelError(
        f"{type(model).__name__} does not attend in layer {layer} for one token, so no step can be "
        "timed: pass dense_below as a number"
    )


class _Step:
    """Two caches of a layer with the same random tokens, the model's own and an indexed one, and
    one step over each; every call appends a token."""

    def __init__(
        self, model: PreTrainedModel, run: SparseRun, layer: int, inputs: Inputs, n: int
    ) -> None:
        self.layer, self.inputs, self.eager = layer, inputs, run.eager
        self.run = replace(run, receipt=run.receipt.fresh(), finite=FiniteWatch(), observers=())
        draw = _Draw(inputs.query.device)
        self.queries = cycle([draw.like(inputs.query) for _ in range(_QUERIES)])
        self.keys, self.values = draw.like(inputs.key), draw.like(inputs.value)
        keys, values = (draw.like(part, max(1, n)) for part in (inputs.key, inputs.value))
        config = text_config(model)
        self.own, self.indexed = DynamicCache(config=config), DynamicCache(config=config)
        indexed_layer(self.indexed, layer, layer in run.full_layers)
        for cache in (self.own, self.indexed):
            cache.update(keys, values, layer)

    def dense(self) -> Tensor:
        """As before attach: transformers' cache, the model's own attention."""
        inputs = self.inputs
        keys, values = self.own.update(self.keys, self.values, self.layer)
        return dense_attention(
            inputs.module, next(self.queries), keys, values, None, eager=self.eager,
            scaling=inputs.scaling, dropout=inputs.dropout, **inputs.others,
        )[0]  # fmt: skip

    def sparse(self) -> Tensor:
        """With attach, as attention.hooks and transformers call it."""
        inputs, cache = self.inputs, self.indexed
        layer = indexed_layer(cache, self.layer, self.layer in self.run.full_layers)
        layer.written = False
        call = LayerCall(self.run, self.layer, layer, has_cache=True)
        keys, values = cache.update(self.keys, self.values, self.layer)
        return forward(
            inputs.module, next(self.queries), keys, values, None,
            scaling=inputs.scaling, dropout=inputs.dropout, **(inputs.others | {CALL: call}),
        )[0]  # fmt: skip


class _Draw:
    """Random numbers of its own: the caller's generator stays as it is."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)

    def like(self, part: Tensor, tokens: int = 1) -> Tensor:
        """Normal numbers (1, heads, tokens, D) of a part's heads, device and dtype."""
        shape = (1, part.shape[1], tokens, part.shape[3])
        return torch.randn(shape, generator=self.generator, dtype=part.dtype, device=part.device)

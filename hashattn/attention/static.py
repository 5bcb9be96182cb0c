"""Decode steps over a static cache that torch.compile and CUDA graphs hold.

How many tokens are cached is known to the device alone, and nothing here asks it. So what a step
needs of the host is prepared by the calls before it, which do wait: settings, counters and room
for codes, and whether every row sees one span of tokens that ends at the newest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from hashattn.attention import refusals
from hashattn.attention.device_counts import counted_there
from hashattn.attention.finite import non_finite
from hashattn.attention.inputs import Inputs
from hashattn.attention.masks import spans_of, spans_plan, static_spans, tokens_seen
from hashattn.kernels import StaticStep, count_dense, register_step, reserve_step, static_step
from hashattn.models.families import adds_position_bias
from hashattn.selectors.base import Selector
from hashattn.selectors.plan import drawn_tokens

if TYPE_CHECKING:
    from hashattn.attention.run import LayerCall, SparseRun


@dataclass(eq=False)
class LayerSteps:
    """What the steps of a layer over static caches of one size are read by.

    number: of `step` (kernels.register_step). counters: of the run. shares, sampled: the budget's
    factors of the layer, (lists, 1) float64, or None. bits: auxiliary and nominal ones.
    """

    selector: Selector
    capacity: int
    step: StaticStep
    number: int
    counters: Tensor
    bits: tuple[float, float]
    shares: Tensor | None
    sampled: Tensor | None


def is_static(cache: Cache, layer: int) -> bool:
    """Whether a layer of a cache is static."""
    return layer < len(cache.layers) and isinstance(cache.layers[layer], StaticLayer)


def continues_static(cache: Cache) -> bool:
    """Whether a call of one row over this cache is a step for sure: its layers are static, and have
    an index, so that the prompt was read."""
    return any(getattr(layer, "steps", None) is not None for layer in cache.layers)


def prepare(call: LayerCall, inputs: Inputs, n: int) -> None:
    """After a call that read or encoded n tokens: let the steps that follow it be `ready`."""
    layer, run = call.cache_layer, call.run
    if not call.static:
        return
    if call.always_dense is not None:
        run.counts.of(call.layer, inputs.query.device, reason=call.always_dense)
    if not call.indexed or layer.behind:
        return
    layer.steps = None
    if not _one_span(inputs.mask, n):
        return
    own = run.static.get(call.layer)
    if own is None or own.selector is not run.selector or own.capacity != layer.max_cache_len:
        own = run.static[call.layer] = _layer_steps(call, inputs)
    layer.steps = own


def _one_span(mask: Tensor | None, n: int) -> bool:
    """Whether the tokens that rows to come will see are contiguous, as far as is known."""
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return False
    spans = spans_of(mask[:, :, -1:, :n])
    return spans is not None and bool((spans[..., 1] == n).all())


@torch.no_grad()
def _layer_steps(call: LayerCall, inputs: Inputs) -> LayerSteps | None:
    """None for a selector whose steps no operator reads."""
    run, capacity = call.run, call.cache_layer.max_cache_len
    heads, (batch, kv_heads) = inputs.query.shape[1], inputs.key.shape[:2]
    device, lists = inputs.query.device, run.selector.lists(heads, kv_heads)
    spans = torch.tensor([0, capacity], device=device).expand(batch, 1, 2)
    plan = spans_plan(spans, capacity, run.budget)
    plan = run.budget.of_layer(plan, call.layer, kv_heads, lists, run.heads)
    step = run.selector.static_step(
        call.layer, inputs.query, kv_heads, plan, max(plan.width, min(capacity, run.dense_below)),
        inputs.logits(),
    )  # fmt: skip
    if step is None:
        return None
    sizes = heads // kv_heads, inputs.key.shape[3]
    bits = run.selector.auxiliary_bits(*sizes), run.selector.nominal_bits(*sizes)
    counters = run.counts.of(call.layer, device, lists)
    shares, sampled = run.budget.factors(call.layer, kv_heads, lists, run.heads, device)
    step = replace(step, memory=run.memory)
    reserve_step(
        step, inputs.query, inputs.key, inputs.value, call.cache_layer.stores["codes"].room
    )
    number = register_step(step)
    return LayerSteps(run.selector, capacity, step, number, counters, bits, shares, sampled)


def ready(call: LayerCall, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether `read` takes a call: a step whose predecessors prepared it, and of which nobody wants
    to see more than its output."""
    layer, run = call.cache_layer, call.run
    if not call.static or layer is None or layer.steps is None:
        return False
    return (
        _unwatched(run, query)
        and call.current
        and layer.written
        and layer.steps is run.static.get(call.layer)
        and layer.steps.selector is run.selector
        and run.fallback is None
        and run.kept is None
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
        and not adds_position_bias(kwargs)
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def ready_dense(call: LayerCall, query: Tensor) -> bool:
    """Whether `read_dense` takes a call: a step of a layer that stays dense. On a CPU, outside of
    graphs, our own kernel is faster and counting is free."""
    there = torch.compiler.is_compiling() or counted_there(query.device)
    prepared = call.continues and (call.layer, call.always_dense) in call.run.counts.counters
    return there and prepared and call.always_dense is not None and _unwatched(call.run, query)


def _unwatched(run: SparseRun, query: Tensor) -> bool:
    """Whether a call is a step of which nobody wants to see more than its output."""
    return query.shape[2] == 1 and not run.observers and not run.receipt.keep_steps


def read_dense(call: LayerCall, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The model's own attention in a step, counted without a number from the device."""
    refusals.refuse_call(call, inputs)
    batch, room, layer = inputs.query.shape[0], inputs.key.shape[2], call.cache_layer
    counters = call.run.counts.counters[call.layer, call.always_dense]
    seen = torch.as_tensor(tokens_seen(inputs.query, inputs.mask, room), device=counters.device)
    longest = room if layer is None else layer.cumulative_length
    count_dense(counters, batch, seen, longest)
    return inputs.dense(call.run.eager)


def read(call: LayerCall, inputs: Inputs) -> Tensor:
    """Output (batch, heads, 1, Dv) of a step, without a number from the device."""
    refusals.refuse_call(call, inputs)
    refusals.refuse_training(inputs.module, inputs.query, inputs.others)
    run, layer = call.run, call.cache_layer
    own, length = layer.steps, layer.cumulative_length
    spans, heavy, drawn = _plan(call, inputs.mask, inputs.query.shape[0], length)
    if own.shares is not None:
        heavy = _unless_short(run, length, (heavy * own.shares).floor().long(), heavy)
    if own.step.slopes is None:
        drawn = None
    elif own.sampled is not None:
        drawn = _unless_short(run, length, drawn_tokens(heavy, own.sampled), 0)
    run.receipt.auxiliary_bits, run.receipt.nominal_bits = own.bits
    layer.behind = False
    arguments = (
        inputs.query, inputs.key, inputs.value, layer.stores["codes"].room, own.counters,
        length, spans, heavy, drawn, inputs.logits()["sinks"], own.number,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return static_step(*arguments)
    try:
        return static_step(*arguments)
    except FloatingPointError as error:
        raise non_finite(call.layer) from error


def _unless_short(run: SparseRun, length: Tensor, value: Tensor, short: Tensor | int) -> Tensor:
    """`value`, or where fewer than run.dense_below tokens are cached, `short`."""
    return torch.where(length < run.dense_below, short, value) if run.dense_below else value


def _plan(
    call: LayerCall, mask: Tensor | None, batch: int, length: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_make_plan`, once for all layers of a step; in a graph the compiler sees to that."""
    if mask is None or torch.compiler.is_compiling():
        return _make_plan(call.run, mask, batch, length)
    return call.run.once(mask, call.layer, lambda: _make_plan(call.run, mask, batch, length))


def _make_plan(
    run: SparseRun, mask: Tensor | None, batch: int, length: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Spans (batch, 1, 2) of a step over a static cache of `length` () tokens, heavy tokens and
    which part of them is drawn, where that is one number, (batch, 1, 1), all int64. Where a call
    should be dense because its tokens are few, all are heavy."""
    if mask is None:
        spans = torch.stack((torch.zeros_like(length), length)).expand(batch, 1, 2).contiguous()
    else:
        spans = static_spans(mask, batch)
    seen = (spans[..., 1] - spans[..., 0]).clamp(min=0)
    heavy = _unless_short(run, length, run.budget.heavy_tokens(seen), seen)[:, None]
    drawn, share = None, run.budget.sampled
    if share and not isinstance(share, tuple):
        drawn = _unless_short(run, length, drawn_tokens(heavy, share), 0)
    return spans, heavy, drawn

"""The attention function registered with transformers: one call of one layer.

A call is sparse when it has few query rows and a cached context; every other call goes to
`dense_attention`, and the receipt and other listeners are told the reason.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashattn.attention import refusals, static
from hashattn.attention.device_counts import counted_there
from hashattn.attention.fallback_reading import gather_rows, read_verified, reading_of
from hashattn.attention.finite import non_finite
from hashattn.attention.inputs import Inputs
from hashattn.attention.masks import tokens_seen, visible_tokens
from hashattn.attention.observer import LayerStep
from hashattn.attention.run import CALL, NAME, LayerCall
from hashattn.kernels import Rule, attend, dense_decode
from hashattn.selectors.base import KeyView
from hashattn.selectors.plan import SelectionPlan


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature -> output (batch, q, heads, head_dim), weights or None.

    query: (batch, heads, q, head_dim); key and value: (batch, kv_heads, room, head_dim), the whole
    cache; attention_mask: (batch or 1, heads or 1, q, at least n) or None. Raises the errors of
    `attention.refusals` for calls that sparse attention cannot serve.
    """
    call = kwargs.pop(CALL, None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = Inputs(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if isinstance(call, LayerCall):
        if static.ready(call, query, attention_mask, kwargs):
            return static.read(call, inputs).transpose(1, 2).contiguous(), None
        if static.ready_dense(call, query):
            return static.read_dense(call, inputs)
    return _forward(call, inputs)


@torch._dynamo.disable  # selection has data-dependent shapes and writes the receipt
def _forward(call: Any, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """`forward` of all calls but steps over a static cache."""
    module, query, key, value = inputs.module, inputs.query, inputs.key, inputs.value
    attention_mask, kwargs = inputs.mask, inputs.others
    if not isinstance(call, LayerCall):  # a module that attach did not find, or a model's copy
        return inputs.dense(eager=call is not None and call.eager)
    refusals.refuse_call(call, inputs)
    n = call.tokens_cached(key)
    reason = call.dense_reason(query.shape[2], n, attention_mask, kwargs)
    if call.stored and key.shape[2] < n and (reason is not None or call.reads_all):
        whole_key, whole_value = call.cache_layer.whole()
        inputs = replace(inputs, key=whole_key, value=whole_value, computed=(key, value))
    if reason is not None and not call.needs_index(n):
        return _left_dense(call, inputs, reason, n)
    clock = call.run.clock(query.device)
    if reason is not None:
        view = _key_view(call, inputs, n)
        clock.lap("encode")
        out, weights = _dense(call, inputs, reason, n)
        step = LayerStep(call.layer, query, n, tokens_seen(query, attention_mask, n), reason)
    else:
        refusals.refuse_training(module, query, kwargs)
        read = _read if call.run.fallback is None else _read_verified
        step, out = read(call, inputs, n, clock)
        view = step.view
        out, weights = out.transpose(1, 2).contiguous(), None
    clock.lap("attend")
    if reason is not None and call.run.observers:  # what dense attention weighs needs its keys
        seen = replace(view, visible=visible_tokens(attention_mask, n))
        step = replace(step, view=seen, logits=inputs.logits())
    if call.indexed and call.run.selector.observes:
        _observe(call, inputs, view, step)
    static.prepare(call, inputs, n)
    seconds = clock.seconds()
    call.run.tell(step if seconds is None else replace(step, seconds=seconds))
    return out, weights


@torch.no_grad()
def _key_view(call: LayerCall, inputs: Inputs, n: int) -> KeyView:
    """The n keys (batch, kv_heads, n, head_dim) with the selector's index, brought up to date; NaN
    in place of keys that lie in a store and that nobody looks at.

    New keys are encoded on every call that needs them there (LayerCall.needs_index), prefill
    included, so that a decode step encodes only its own.
    """
    keys = _first(inputs.key, n)
    if not call.indexed:
        return KeyView(keys=keys)
    layer, selector = call.cache_layer, call.run.selector
    if not layer.written:
        refusals.refuse_other_slot(call.layer)
    encoded_before = layer.index_length if layer.index_owner == selector.identity else 0
    newest = inputs.newest(n)
    first = newest[0].shape[2] - n + encoded_before
    if first < 0:  # another method's index, or none: the layer was filled before attach
        newest, first = layer.whole(), encoded_before
    call.run.finite.check(call.layer, *newest, first)
    index = layer.sync_index(selector, call.layer, *newest, n)
    if selector.observes:
        before = n - inputs.query.shape[2]
        refusals.refuse_unobserved(selector, layer.observed_length, before)
    if keys.shape[2] < n:
        keys = keys.new_full((1,), torch.nan).expand(*keys.shape[:2], n, keys.shape[3])
    return KeyView(keys=keys, index=index)


def _read(call: LayerCall, inputs: Inputs, n: int, clock: Any) -> tuple[LayerStep, Tensor]:
    """A sparse call with the budget as it is: the step and its output (batch, heads, q, Dv)."""
    plan = _plan(call, inputs, n)
    if _in_one_call(call, inputs, plan, n):
        return _read_at_once(call, inputs, plan, clock)
    view = _planned_view(call, inputs, plan, n)
    clock.lap("encode")
    with torch.no_grad():
        indices, log_weights = call.run.selector.sample(
            call.layer, inputs.query, view, inputs.scaling, plan
        )
        indices, log_weights = call.run.with_kept(indices, log_weights, plan)
    clock.lap("select")
    logits = inputs.logits()
    out = _attend(call, inputs, indices, log_weights=log_weights, **logits)
    return _step(call, inputs, plan, view, logits, indices, log_weights), out


def _attend(call: LayerCall, inputs: Inputs, indices: Tensor, **logits: Any) -> Any:
    """`kernels.attend` over the tokens of indices, wherever their rows lie."""
    if call.stored:
        return call.cache_layer.attend(inputs.query, indices, **logits)
    # the whole buffer, not its first n tokens: slicing a static cache would copy it
    return attend(inputs.query, inputs.key, inputs.value, indices, **logits)


def _in_one_call(call: LayerCall, inputs: Inputs, plan: SelectionPlan, n: int) -> bool:
    """Whether the selector reads this step in one call of a kernel: one row, whose token is the
    only one that the index lacks."""
    layer, selector = call.cache_layer, call.run.selector
    return (
        inputs.query.shape[2] == 1
        and not call.stored
        and call.run.kept is None
        and selector.reads_at_once(call.layer, plan)
        and layer.written
        and layer.index_owner == selector.identity
        and layer.index_length == n - 1
    )


@torch.no_grad()
def _read_at_once(
    call: LayerCall, inputs: Inputs, plan: SelectionPlan, clock: Any, rule: Rule | None = None
) -> tuple[LayerStep, Tensor] | None:
    """`_read`, or with a rule `_read_verified`, where encoding, selection and attention are one
    call of a kernel. None where none follows the rule, with nothing appended."""
    selector, logits, stores = call.run.selector, inputs.logits(), call.cache_layer.stores
    arguments = call.layer, inputs.query, inputs.key, inputs.value, stores, plan, logits
    counters = _counters(call, inputs, plan.n) if rule is None else None
    try:
        if rule is None:
            made = *selector.read_at_once(*arguments, counters), None
        else:
            made = selector.read_verified(*arguments, rule)
    except FloatingPointError as error:
        raise non_finite(call.layer) from error
    if made is None:
        return None
    out, indices, log_weights, levels = made
    clock.lap("step")
    view, counted = _view_after(call, inputs, plan), counters is not None
    step = _step(call, inputs, plan, view, logits, indices, log_weights, levels, counted)
    return step, out


def _counters(call: LayerCall, inputs: Inputs, n: int) -> Tensor | None:
    """Where a kernel counts the step, if the receipt can leave that to it."""
    run, device = call.run, inputs.query.device
    if counted_there(device) and not run.receipt.keep_steps:
        lists = run.selector.lists(inputs.query.shape[1], inputs.key.shape[1])
        return run.counts.of(call.layer, device, lists)
    if not inputs.key.is_cpu:  # there the kernel looks, and here nothing waits for the device
        run.finite.check(call.layer, inputs.key[:, :, :n], inputs.value[:, :, :n], n - 1)
    return None


def _view_after(call: LayerCall, inputs: Inputs, plan: SelectionPlan) -> KeyView:
    """The keys and the index after a kernel that has encoded the newest token."""
    layer = call.cache_layer
    layer.index_length, layer.behind = plan.n, False
    visible = None if inputs.mask is None else plan.seen[:, 0, -1]
    return KeyView(keys=_first(inputs.key, plan.n), index=layer.index(), visible=visible)


def _read_verified(call: LayerCall, inputs: Inputs, n: int, clock: Any) -> tuple[LayerStep, Tensor]:
    """The same, with lists that grow until the fallback accepts them."""
    plan, run = _plan(call, inputs, n), call.run
    if _in_one_call(call, inputs, plan, n):
        rule = run.fallback.rule(call.layer, inputs.query.device)
        made = _read_at_once(call, inputs, plan, clock, rule)
        if made is not None:
            return made
    view = _planned_view(call, inputs, plan, n)
    clock.lap("encode")
    step = _step(call, inputs, plan, view, inputs.logits())

    def sample(plan: SelectionPlan) -> tuple[Tensor, Tensor | None]:
        chosen = run.selector.sample(call.layer, inputs.query, view, inputs.scaling, plan)
        return run.with_kept(*chosen, plan)

    gather = partial(gather_rows, inputs.key, inputs.value)
    if call.stored:
        gather = call.cache_layer.gather
    reading = reading_of(
        sample, partial(_attend, call, inputs), inputs.query, gather, step.plan, step.logits,
        run.fallback.levels, run.fallback.begin(call.layer, inputs.query.device), clock,
    )  # fmt: skip
    read_verified(reading, run.fallback, call.layer, clock)
    step = replace(
        step, indices=reading.indices, log_weights=reading.log_weights, levels=reading.levels
    )
    return step, reading.out


def _plan(call: LayerCall, inputs: Inputs, n: int) -> SelectionPlan:
    """What the rows of a sparse call may choose from."""
    run, query, kv_heads = call.run, inputs.query, inputs.key.shape[1]
    shared = run.plan(inputs.mask, query, n)
    lists = run.selector.lists(query.shape[1], kv_heads)
    return run.budget.of_layer(shared, call.layer, kv_heads, lists, run.heads)


def _planned_view(call: LayerCall, inputs: Inputs, plan: SelectionPlan, n: int) -> KeyView:
    """The keys with the selector's index, and what of them the last row sees."""
    view = _key_view(call, inputs, n)
    return view if inputs.mask is None else replace(view, visible=plan.seen[:, 0, -1])


def _step(
    call: LayerCall, inputs: Inputs, plan: SelectionPlan, view: KeyView, logits: dict[str, Any],
    indices: Tensor | None = None, log_weights: Tensor | None = None, levels: Tensor | None = None,
    counted: bool = False,
) -> LayerStep:  # fmt: skip
    """A sparse call as listeners are told of it; if it is counted, the receipt need not be."""
    run, query = call.run, inputs.query
    if run.receipt.auxiliary_bits is None:
        group, head_dim = query.shape[1] // inputs.key.shape[1], inputs.key.shape[3]
        run.receipt.auxiliary_bits = run.selector.auxiliary_bits(group, head_dim)
        run.receipt.nominal_bits = run.selector.nominal_bits(group, head_dim)
    seen = 0 if counted and not run.observers else plan.visible_total
    return LayerStep(
        call.layer, query, plan.n, seen, indices=indices, log_weights=log_weights, plan=plan,
        view=view, values=_first(inputs.value, plan.n), logits=logits, levels=levels,
        counted=counted,
    )  # fmt: skip


def _first(states: Tensor, n: int) -> Tensor:
    """The first n tokens of states (batch, kv_heads, at least n, dim)."""
    return states if states.shape[2] == n else states[:, :, :n]


def _dense(call: LayerCall, inputs: Inputs, reason: str, n: int) -> tuple[Tensor, Tensor | None]:
    """A dense call, by our own kernel where that is faster and every row sees one span of tokens.

    It is for decode steps on a CPU, in a dense layer of a sparse run or with a dense selector that
    asks for it: torch's attention repeats K and V there, or reads them once per query head.
    """
    query = inputs.query
    allowed = reason == "dense_layer" or (reason == "dense_selector" and call.run.selector.kernel)
    one_row = query.shape[2] == 1 and query.is_cpu and not call.run.eager
    if allowed and one_row and not torch.is_grad_enabled():
        spans = call.run.plan(inputs.mask, query, n).spans
        if spans is not None:
            out = dense_decode(query, inputs.key, inputs.value, spans=spans, **inputs.logits())
            return out.transpose(1, 2).contiguous(), None
    return inputs.dense(call.run.eager)


def _left_dense(
    call: LayerCall, inputs: Inputs, reason: str, n: int
) -> tuple[Tensor, Tensor | None]:
    """A dense call in a context too short to be read sparsely, which costs the model's own: no key
    is encoded, and only the receipt is told."""
    query, seen = inputs.query, tokens_seen(inputs.query, inputs.mask, n)
    call.run.receipt.add(
        call.layer, reason=reason, rows=query.shape[0] * query.shape[2], most=query.shape[2],
        longest=n, cached=seen, read=seen,
    )  # fmt: skip
    return _dense(call, inputs, reason, n)


@torch.no_grad()
def _observe(call: LayerCall, inputs: Inputs, view: KeyView, step: LayerStep) -> None:
    """Let the selector learn from the attention of the call."""
    if step.reason is not None:
        view = replace(view, visible=visible_tokens(inputs.mask, step.n))
    selector = call.run.selector
    state = selector.observe(call.layer, step.query, view, inputs.scaling, step.indices)
    call.cache_layer.keep_observed(selector, state)


def _boolean_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask; all arguments pass through, as their names differ between releases."""
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Register NAME in transformers: attention and mask; without the mask padding is ignored."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, _boolean_mask)

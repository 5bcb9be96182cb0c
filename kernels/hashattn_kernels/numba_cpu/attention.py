"""Attention of the query heads that share a token list, one block of tokens after another.

The softmax is the online one (Milakov and Gimelshein, arXiv 1805.02867): a block's weights are
relative to the largest logit so far, and earlier sums are rescaled when it rises.

Reading memory takes most of the time, so while a block is computed the rows of a later one are
prefetched (`simd.prefetch`) at the pace at which rows are consumed. On an EPYC (Zen 4) a dense step
then reads float32 at nine tenths of the memory's speed; blocks alone reach a third, because the
processor's own prefetcher does not follow rows of 512 bytes that are read in twos and fours.
"""

import math
from functools import cache

import numpy as np
import torch

from .error_bars import add_block, look_at_block
from .passes import (
    KEYS,
    LATER_KEYS,
    LATER_VALUES,
    NEXT_KEYS,
    NEXT_VALUES,
    SCRATCH,
    VALUES,
    add_values_of_four,
    add_values_of_one,
    logits_of_four,
    logits_of_one,
    scale_block,
)
from .regions import Region, address_of, call_type, report, share_of
from .simd import (
    add,
    at_address,
    exp,
    kernel,
    larger,
    load,
    multiply,
    queries_at,
    splat,
    states_at,
    store,
    subtract,
    swap_1,
    swap_2,
    swap_4,
)
from .static import CODES, STORAGE, block_of, static_of

ROWS_AHEAD = 2  # how far contiguous rows of separate K and V are prefetched ahead
LOWEST = np.finfo(np.float32).min  # where the top starts; finite, as inf - inf is NaN

# a call of attend_share
CALL = call_type(
    "parts", "batch", "lists", "rows", "group", "lists_per_kv_head", "width", "tokens",
    "q", "q_size", "q_batch", "q_head", "q_row",
    "k", "k_size", "k_batch", "k_head", "k_token",
    "v", "v_size", "v_start", "v_batch", "v_head", "v_token",
    "indices", "log_weights", "spans", "out", "lse", "memory", "memory_size",
    real=("scale", "softcap", "unweighted"),
)  # fmt: skip


@kernel
def highest(static, a):
    """In every lane, the largest of the lanes that belong to its head."""
    if static.heads == 1:
        a = larger(a, swap_1(a))
        a = larger(a, swap_2(a))
    return larger(a, swap_4(a))


@kernel
def total_of(static, a):
    """In every lane, the sum of the lanes that belong to its head."""
    if static.heads == 1:
        a = add(a, swap_1(a))
        a = add(a, swap_2(a))
    return add(a, swap_4(a))


@kernel
def cap(logits, at, softcap):
    """softcap * tanh(logit / softcap) of eight logits, as in Gemma 2."""
    for i in range(at, at + 8):
        logits[i] = softcap * np.float32(math.tanh(logits[i] / softcap))


@kernel
def weigh(static, logits, softcap, log_weights, at, valid, state, out, o):
    """Turn a block's logits into weights; update state = [top | total] (8 lanes each) and out.

    log_weights[at:] are added to the logits of the block's tokens, unless there are none.
    The top may skip a NaN, whose weight is NaN all the same. An infinite logit makes an infinite
    top, and inf - inf is NaN; a logit of -inf has weight 0.
    """
    lanes = static.heads * static.block
    if softcap > 0:
        for i in range(0, lanes, 8):
            cap(logits, i, softcap)
    if len(log_weights) > 0:
        for i in range(static.heads * valid):
            logits[i] += log_weights[at + i // static.heads]
    for i in range(static.heads * valid, lanes):
        logits[i] = -np.inf
    before = load(state, 0)
    top = load(logits, 0)
    for i in range(8, lanes, 8):
        top = larger(top, load(logits, i))
    top = larger(before, highest(static, top))
    scale = exp(subtract(before, top))
    total = multiply(load(state, 8), scale)
    for i in range(0, lanes, 8):
        weight = exp(subtract(load(logits, i), top))
        total = add(total, weight)
        store(logits, i, weight)
    store(state, 0, scale)
    for head in range(static.heads):
        if state[head] != np.float32(1):
            factor = splat(state[head])
            for d in range(o, o + static.value_dim, 8):
                store(out, d, multiply(load(out, d), factor))
        o += static.value_dim
    store(state, 0, top)
    store(state, 8, total)


@kernel
def find_rows(static, call, indices, at, first, last, key, value, scratch, keys, values):
    """Offsets of the K and V rows of a block's tokens; past `last` the last one is repeated.

    Returns how many listed tokens are outside the cache (token 0 takes their place).
    """
    outside = 0
    for j in range(static.block):
        token = min(first + j, last - 1)
        if not static.contiguous:
            token = indices[at + token]
            if token < 0 or token >= call.tokens:
                outside += 1
                token = 0
        scratch[keys + j] = key + token * call.k_token
        scratch[values + j] = value + token * call.v_token
    return outside


@kernel
def choose_later(static, scratch, interleaved):
    """Fill LATER_KEYS and LATER_VALUES: the rows to prefetch while this block is computed.

    Scattered rows: those of the next block. Contiguous rows are prefetched in the order of memory:
    the next block from its start where the V row of a token follows its K row (interleaved), else
    a few rows ahead in K and in V.
    """
    block = static.block
    for j in range(block):
        if static.contiguous and interleaved:
            source = NEXT_VALUES if j % 2 else NEXT_KEYS
            scratch[LATER_KEYS + j] = scratch[source + j // 2]
            scratch[LATER_VALUES + j] = scratch[source + (block + j) // 2]
        elif static.contiguous:
            ahead = j + ROWS_AHEAD
            inside, beyond = ahead < block, ahead - block
            scratch[LATER_KEYS + j] = scratch[KEYS + ahead if inside else NEXT_KEYS + beyond]
            scratch[LATER_VALUES + j] = scratch[VALUES + ahead if inside else NEXT_VALUES + beyond]
        else:
            scratch[LATER_KEYS + j] = scratch[NEXT_KEYS + j]
            scratch[LATER_VALUES + j] = scratch[NEXT_VALUES + j]


@kernel
def attend_tokens(static, call, indices, log_weights, at, first, last, work, keys, key, values,
                  value, softcap, scratch, sample):  # fmt: skip
    """Attention of a unit's passes to entries first to last of its list, or to these tokens.

    work is laid out by `workspace`. sample: None, or the sums of error_bars, which are made along
    the way (a type: what nobody asks for is not compiled). Returns how many listed tokens are
    outside the cache.
    """
    passes, q, state, o = workspace(static, call)
    interleaved = value - key == static.dim and call.k_token == call.v_token
    seen = splat(np.float32(0))
    outside = find_rows(static, call, indices, at, first, last, key, value, scratch,
                        NEXT_KEYS, NEXT_VALUES)  # fmt: skip
    while first < last:
        for j in range(static.block):
            scratch[KEYS + j] = scratch[NEXT_KEYS + j]
            scratch[VALUES + j] = scratch[NEXT_VALUES + j]
        valid, here = min(static.block, last - first), at + first
        first += static.block
        outside += find_rows(static, call, indices, at, first, last, key, value, scratch,
                             NEXT_KEYS, NEXT_VALUES)  # fmt: skip
        choose_later(static, scratch, interleaved)
        later_keys, later_values = LATER_KEYS, LATER_VALUES
        if sample is not None:
            look_at_block(static, values, scratch, VALUES, log_weights, here, valid, sample)
        for number in range(passes):
            top = state + 16 * number
            before = load(work, top)
            queries = q + number * static.heads * static.dim
            out = o + number * static.heads * static.value_dim
            if static.heads == 4:
                seen = logits_of_four(static, work, queries, keys, scratch, later_keys, work, seen)
            else:
                seen = logits_of_one(static, work, queries, keys, scratch, later_keys, work, seen)
            if static.scaled:
                scale_block(static, keys, scratch, static.codes, work)
            weigh(static, work, softcap, log_weights, here, valid, work[top:], work, out)
            if static.scaled:
                scale_block(static, keys, scratch, static.codes + 2, work)
            if static.heads == 4:
                seen = add_values_of_four(
                    static, work, values, scratch, later_values, work, out, seen
                )
            else:
                seen = add_values_of_one(
                    static, work, values, scratch, later_values, work, out, seen
                )
            # what else is done with the block finds its rows in the caches
            later_keys, later_values = KEYS, VALUES
            if sample is not None:
                add_block(static, work, number, before, load(work, top), sample)
                sums, to = sample[1], out - o
                if static.heads == 4:
                    seen = add_values_of_four(static, work, values, scratch, VALUES, sums, to, seen)
                else:
                    seen = add_values_of_one(static, work, values, scratch, VALUES, sums, to, seen)
    store(work, 0, seen)
    return outside


@kernel
def workspace(static, call):
    """Passes of a unit, and where its queries, softmax states and sums lie in `work`.

    A block's logits lie at 0. `backend` allocates it.
    """
    passes = (call.group + static.heads - 1) // static.heads
    q = static.heads * static.block
    state = q + passes * static.heads * static.dim
    return passes, q, state, state + 16 * passes


@kernel
def begin(static, call, queries, at, scale, work):
    """Copy a unit's queries to `work`, scaled; reset states and sums. Missing heads are zeros."""
    passes, q, state, o = workspace(static, call)
    factor = splat(scale)
    for head in range(passes * static.heads):
        for d in range(0, static.dim, 8):
            row = splat(np.float32(0))
            if head < call.group:
                row = multiply(load(queries, at + head * call.q_head + d), factor)
            store(work, q + head * static.dim + d, row)
    for number in range(passes):
        store(work, state + 16 * number, splat(LOWEST))
        store(work, state + 16 * number + 8, splat(np.float32(0)))
    for d in range(o, o + passes * static.heads * static.value_dim, 8):
        store(work, d, splat(np.float32(0)))


@kernel
def finish(static, call, work, unweighted, out, at, lse, row):
    """Write sums / totals and log-sum-exp of a unit's heads: out[at + h * rows * value_dim].

    unweighted: stands for 1 / total where no token has weight.
    """
    passes, _, state, o = workspace(static, call)
    step = call.rows
    for number in range(passes):
        totals = state + 16 * number + 8
        store(work, totals, total_of(static, load(work, totals)))
        for head in range(min(static.heads, call.group - number * static.heads)):
            top, total = work[state + 16 * number + head], work[totals + head]
            inverse = unweighted
            lse[row] = -np.inf
            if total != 0:  # NaN too
                inverse = np.float32(1) / total
                lse[row] = top + np.float32(math.log(total))
            source = o + (number * static.heads + head) * static.value_dim
            for d in range(0, static.value_dim, 8):
                store(out, at + d, multiply(load(work, source + d), splat(inverse)))
            at += step * static.value_dim
            row += step


@kernel
def attend_share(static, data):
    """Attention of this thread's units: (batch, list, row, part), the last fastest.

    data: the address of a CALL. A list's tokens are indices (batch, lists, rows, width) int32,
    padded with -1, and log_weights, float32 and of this shape, are added to their logits unless the
    address is 0; contiguous kernels read tokens spans[batch, row, 0] to spans[batch, row, 1],
    int64, instead. out (parts, batch, heads, rows, value_dim) of the query type and lse (the same
    without value_dim) float32 hold every part separately. unweighted: stands for 1 / sum where
    tokens are listed and all their logits are -inf; a list without tokens gives zeros. Reports how
    many listed tokens are outside the cache.
    """
    call = at_address(address_of(data), 1, CALL)[0]
    number, start, stop = share_of(call.thread_number, call.number, call.threads, call.units)
    parts, lists, rows = call.parts, call.lists, call.rows
    heads, units = lists * call.group, call.batch * lists * rows
    queries = queries_at(static, call.q, call.q_size)
    keys = states_at(static, call.k, call.k_size)
    values = states_at(static, call.v, call.v_size)
    indices = at_address(call.indices, units * call.width, np.int32)
    weighted = units * call.width if call.log_weights else 0
    log_weights = at_address(call.log_weights, weighted, np.float32)
    spans = at_address(call.spans, 2 * call.batch * rows, np.int64)
    rows_out = parts * call.batch * heads * rows
    out = queries_at(static, call.out, rows_out * static.value_dim)
    lse = at_address(call.lse, rows_out, np.float32)
    scratch = at_address(call.memory + number * call.memory_size, SCRATCH, np.int64)
    work = at_address(call.memory + number * call.memory_size + 8 * SCRATCH,
                      call.memory_size // 4 - 2 * SCRATCH, np.float32)  # fmt: skip
    scale, softcap = np.float32(call.scale), np.float32(call.softcap)
    outside = 0
    for unit in range(start, stop):
        part, row = unit % parts, unit // parts % rows
        line, batch = unit // (parts * rows) % lists, unit // (parts * rows * lists)
        kv_head = line // call.lists_per_kv_head
        at = ((batch * lists + line) * rows + row) * call.width
        if static.contiguous:
            first, last = spans[2 * (batch * rows + row)], spans[2 * (batch * rows + row) + 1]
        else:
            first, last = 0, call.width
            while last > 0 and indices[at + last - 1] < 0:
                last -= 1
        tokens = last - first
        unweighted = np.float32(call.unweighted) if tokens > 0 else np.float32(0)
        first, last = first + tokens * part // parts, first + tokens * (part + 1) // parts
        q = batch * call.q_batch + line * call.group * call.q_head
        begin(static, call, queries, q + row * call.q_row, scale, work)
        if first < last:
            key = batch * call.k_batch + kv_head * call.k_head
            value = call.v_start + batch * call.v_batch + kv_head * call.v_head
            outside += attend_tokens(static, call, indices, log_weights, at, first, last, work,
                                     keys, key, values, value, softcap, scratch,
                                     None)  # fmt: skip
        to = ((part * call.batch + batch) * heads + line * call.group) * rows + row
        finish(static, call, work, unweighted, out, to * static.value_dim, lse, to)
    report(call.results, call.threads, number, outside)


@cache
def attend_region(
    dim: int, value_dim: int, heads: int, contiguous: int, states: torch.dtype, queries: torch.dtype
) -> tuple[Region, int]:
    """The compiled region of these heads and dtypes, and the tokens of its block. states: of K and
    V, or int8 and uint8 for rows of 8 and of 4 bits."""
    block = block_of(dim, value_dim, states.itemsize, bool(contiguous))
    state_type, query_type = (STORAGE | CODES)[states], STORAGE[queries]

    def body(data):
        static = static_of(dim, value_dim, block, heads, contiguous, state_type, query_type)
        attend_share(static, data)

    return Region(body), block

"""Attention of decode steps over token lists or spans, split over the tokens (flash-decoding).

Softmax sums run in float32 and base 2. A first launch writes an output and a log-sum-exp for every
part of a list, a second one merges the parts.

NaN and infinities have the same effect as in torch. A maximum drops NaN, but the weight of a NaN
logit, exp2(logit - maximum), is NaN, and so are the sum and the output; the same holds for inf.
"""

import triton
import triton.language as tl

from .bits import INTERPRET

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # log of the sum of tokens that have no weight


@triton.jit
def product(a, b):
    """Matrix product without rounding its terms; the interpreter has no bfloat16 arithmetic."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend_kernel(
    Q, K, V, INDICES, SPANS, LOG_WEIGHTS, PARTS, LSE, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_token, v_batch, v_head, v_token,
    lists, share, q_len, width, split,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIM_SLOTS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, LISTED: tl.constexpr, CAPPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Attention to one part of a list, for the GROUP query heads that read it.

    Grid (parts, batch * lists * q_len); `split` tokens a part. LISTED: tokens of INDICES (rows,
    width) int32, negative for none, with LOG_WEIGHTS (rows, width) float32 added to their logits
    if WEIGHTED; else of the rows' SPANS (batch, q_len, 2) int64. Results: PARTS
    (rows, GROUP, parts, VALUE_DIM) and LSE (rows, GROUP, parts), float32: -inf for no tokens,
    LOWEST for tokens whose logits are all -inf. A single head multiplies in registers, more heads
    on tensor cores.
    """
    part = tl.program_id(0)
    row = tl.program_id(1)
    parts = tl.num_programs(0)
    batch = row // (lists * q_len)
    member = row // q_len % lists
    query = row % q_len
    start = part * split
    if LISTED:
        end = tl.minimum(start + split, width)
        indices = INDICES + row.to(tl.int64) * width
    else:
        span = SPANS + 2 * (batch * q_len + query)
        first = tl.load(span).to(tl.int32)
        end = tl.minimum(start + split, tl.load(span + 1).to(tl.int32) - first)
    head = tl.arange(0, SLOTS)
    dim = tl.arange(0, DIM_SLOTS)
    value_dim = tl.arange(0, VALUE_SLOTS)
    slot = tl.arange(0, BLOCK)
    q = Q + batch.to(tl.int64) * q_batch + query.to(tl.int64) * q_row
    q += (member * GROUP + head)[:, None].to(tl.int64) * q_head + dim[None, :]
    q = tl.load(q, mask=(head < GROUP)[:, None] & (dim < DIM)[None, :], other=0.0)
    if GROUP == 1:
        q = q.to(tl.float32)
    k = K + batch.to(tl.int64) * k_batch + (member // share).to(tl.int64) * k_head + dim[None, :]
    v = V + batch.to(tl.int64) * v_batch + (member // share).to(tl.int64) * v_head
    v += value_dim[None, :]
    highest = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    out = tl.zeros([SLOTS, VALUE_SLOTS], tl.float32)
    for offset in tl.range(start, end, BLOCK, num_stages=STAGES):
        there = offset + slot < end
        if LISTED:
            token = tl.load(indices + offset + slot, mask=there, other=-1)
            there = token >= 0
        else:
            token = first + offset + slot
        token = token.to(tl.int64)[:, None]
        key_mask = there[:, None]
        if DIM < DIM_SLOTS:
            key_mask = key_mask & (dim < DIM)[None, :]
        value_mask = there[:, None]
        if VALUE_DIM < VALUE_SLOTS:
            value_mask = value_mask & (value_dim < VALUE_DIM)[None, :]
        keys = tl.load(k + token * k_token, mask=key_mask, other=0.0)
        values = tl.load(v + token * v_token, mask=value_mask, other=0.0)
        if GROUP == 1:
            logits = tl.sum(keys.to(tl.float32) * q, axis=1)[None, :] * scale
        else:
            logits = product(q, tl.trans(keys)) * scale
        if CAPPED:  # softcap * tanh(logits / softcap)
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        if WEIGHTED:
            added = LOG_WEIGHTS + row.to(tl.int64) * width + offset + slot
            logits += tl.load(added, mask=there, other=0.0)[None, :]
        logits = tl.where(there[None, :], logits * LOG2_E, -float("inf"))
        peak = tl.maximum(highest, tl.max(logits, axis=1))
        safe = tl.where(peak == -float("inf"), 0.0, peak)  # no token so far
        shrink = tl.exp2(highest - safe)
        weights = tl.exp2(logits - safe[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if GROUP == 1:
            weighted = tl.sum(tl.trans(weights) * values.to(tl.float32), axis=0)[None, :]
        else:
            weighted = product(weights.to(V.dtype.element_ty), values)
        out = out * shrink[:, None] + weighted
        highest = peak
    empty = total == 0
    at = (row.to(tl.int64) * GROUP + head) * parts + part
    some = start < end
    if LISTED:
        some = tl.load(indices + start, mask=some, other=-1) >= 0
    nothing = tl.where(some, LOWEST, -float("inf"))
    lse = tl.where(empty, nothing, highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(LSE + at, lse, mask=head < GROUP)
    out = out / tl.where(empty, 1.0, total)[:, None]
    inside = (head < GROUP)[:, None] & (value_dim < VALUE_DIM)[None, :]
    tl.store(PARTS + at[:, None] * VALUE_DIM + value_dim[None, :], out, mask=inside)


@triton.jit
def merge_kernel(
    PARTS, LSE, SINKS, OUT, OUT_LSE, parts, lists, q_len,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a head: OUT (batch, heads, q_len, VALUE_DIM) and its natural log-sum-exp,
    OUT_LSE (batch, heads, q_len).

    Grid (batch * lists * q_len * GROUP); BLOCK parts at a time. SINKS (heads): logits that take
    weight and have no value; without them tokens of no weight give NaN, as 0 / 0 in a softmax.
    """
    at = tl.program_id(0)
    row = at // GROUP
    batch = row // (lists * q_len)
    head = row // q_len % lists * GROUP + at % GROUP
    query = row % q_len
    block = tl.arange(0, BLOCK)
    value_dim = tl.arange(0, VALUE_SLOTS)
    lses = LSE + at.to(tl.int64) * parts
    outs = PARTS + at.to(tl.int64) * parts * VALUE_DIM
    highest = tl.full([], -float("inf"), tl.float32)
    if HAS_SINKS:
        highest = tl.load(SINKS + head).to(tl.float32) * LOG2_E
    for start in range(0, parts, BLOCK):
        lse = tl.load(lses + start + block, mask=start + block < parts, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(lse, axis=0))
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros([], tl.float32)
    if HAS_SINKS:
        total += tl.exp2(tl.load(SINKS + head).to(tl.float32) * LOG2_E - safe)
    out = tl.zeros([VALUE_SLOTS], tl.float32)
    for start in range(0, parts, BLOCK):
        inside = start + block < parts
        weight = tl.exp2(tl.load(lses + start + block, mask=inside, other=-float("inf")) - safe)
        addresses = outs + (start + block)[:, None] * VALUE_DIM + value_dim[None, :]
        inside = inside[:, None] & (value_dim < VALUE_DIM)[None, :]
        total += tl.sum(weight, axis=0)
        out += tl.sum(weight[:, None] * tl.load(addresses, mask=inside, other=0.0), axis=0)
    weightless = highest == LOWEST
    if not HAS_SINKS:
        out = tl.where(weightless, float("nan"), out)
    empty = weightless | (total == 0)
    out = out / tl.where(empty, 1.0, total)
    lse = (safe + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E
    place = (batch.to(tl.int64) * lists * GROUP + head) * q_len + query
    tl.store(OUT + place * VALUE_DIM + value_dim, out.to(OUT.dtype.element_ty),
             mask=value_dim < VALUE_DIM)  # fmt: skip
    tl.store(OUT_LSE + place, tl.where(empty, -float("inf"), lse))

"""Attention of decode steps over token lists or spans, split over the tokens (flash-decoding).

Softmax sums run in float32 and base 2. Every program writes the output and the log-sum-exp of a
part of a list; the last of a list to finish merges its parts.

NaN and infinities have the same effect as in torch. A maximum drops NaN, but the weight of a NaN
logit, exp2(logit - maximum), is NaN, and so are the sum and the output; the same holds for inf.
"""

import triton
import triton.language as tl

from .. import counters
from .bits import INTERPRET
from .rows import decoded, element, scales

LOG2_E = tl.constexpr(1.4426950408889634)
READ = tl.constexpr(counters.READ)
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
    Q, K, V, INDICES, SPANS, LOG_WEIGHTS, SINKS, PARTS, LSE, DONE, OUT, OUT_LSE, COUNTERS,
    scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_token, v_batch, v_head, v_token,
    lists, share, q_len, width, split,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIM_SLOTS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, LISTED: tl.constexpr, CAPPED: tl.constexpr, WEIGHTED: tl.constexpr,
    HAS_SINKS: tl.constexpr, COUNTED: tl.constexpr, HEADS: tl.constexpr, MERGED: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Attention to one part of a list, for the GROUP query heads that read it; then `merge`.

    Grid (parts, batch * lists * q_len); `split` tokens a part. LISTED: tokens of INDICES (rows,
    width) int32, negative for none, with LOG_WEIGHTS (rows, width) float32 added to their logits
    if WEIGHTED; else of the rows' SPANS (batch, q_len, 2) int64. Of the parts: PARTS
    (rows, GROUP, parts, VALUE_DIM) and LSE (rows, GROUP, parts), float32: -inf for no tokens,
    LOWEST for tokens whose logits are all -inf. A single head multiplies in registers where SLOTS
    is 1, others on tensor cores. DONE (rows) int32: 0 before and after. COUNTED: how many tokens
    were read is added to COUNTERS (see counters.py). BITS: 0, or those of an element of rows, of
    which K and V are then words (see rows.py).
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
    q += (member * GROUP + head)[:, None].to(tl.int64) * q_head + element(dim, BITS)[None, :]
    q = tl.load(q, mask=(head < GROUP)[:, None] & (dim < DIM)[None, :], other=0.0)
    if SLOTS == 1:
        q = q.to(tl.float32)
    k = K + batch.to(tl.int64) * k_batch + (member // share).to(tl.int64) * k_head
    v = V + batch.to(tl.int64) * v_batch + (member // share).to(tl.int64) * v_head
    if BITS:
        key_word = tl.arange(0, DIM_SLOTS * BITS // 32)
        value_word = tl.arange(0, VALUE_SLOTS * BITS // 32)
        key_words = DIM * BITS // 32
        value_words = VALUE_DIM * BITS // 32
    highest = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    out = tl.zeros([SLOTS, VALUE_SLOTS], tl.float32)
    read = tl.zeros([BLOCK], tl.int32)
    for offset in tl.range(start, end, BLOCK, num_stages=STAGES):
        there = offset + slot < end
        if LISTED:
            token = tl.load(indices + offset + slot, mask=there, other=-1)
            there = token >= 0
            if COUNTED:
                read += there.to(tl.int32)
        else:
            token = first + offset + slot
        row_at = token.to(tl.int64)
        token = row_at[:, None]
        if BITS:
            scale_word = tl.load(
                k + row_at * k_token + key_words + value_words, mask=there, other=0
            )
            key_scale, value_scale = scales(scale_word, BITS)
            key_mask = there[:, None] & (key_word < key_words)[None, :]
            value_mask = there[:, None] & (value_word < value_words)[None, :]
            keys = tl.load(k + token * k_token + key_word[None, :], mask=key_mask, other=0)
            values = tl.load(v + token * v_token + value_word[None, :], mask=value_mask, other=0)
            keys = decoded(keys, BITS).to(q.dtype)
            values = decoded(values, BITS).to(Q.dtype.element_ty)
        else:
            key_mask = there[:, None]
            if DIM < DIM_SLOTS:
                key_mask = key_mask & (dim < DIM)[None, :]
            value_mask = there[:, None]
            if VALUE_DIM < VALUE_SLOTS:
                value_mask = value_mask & (value_dim < VALUE_DIM)[None, :]
            keys = tl.load(k + token * k_token + dim[None, :], mask=key_mask, other=0.0)
            values = tl.load(v + token * v_token + value_dim[None, :], mask=value_mask, other=0.0)
        if SLOTS == 1:
            logits = tl.sum(keys.to(tl.float32) * q, axis=1)[None, :] * scale
        else:
            logits = product(q, tl.trans(keys)) * scale
        if BITS:
            logits *= key_scale[None, :]
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
        if BITS:
            weights *= value_scale[None, :]
        if SLOTS == 1:
            weighted = tl.sum(tl.trans(weights) * values.to(tl.float32), axis=0)[None, :]
        else:
            weighted = product(weights.to(values.dtype), values)
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
    parts_at = PARTS + at[:, None] * VALUE_DIM + element(value_dim, BITS)[None, :]
    tl.store(parts_at, out, mask=inside)
    if COUNTED:
        tl.atomic_add(COUNTERS + READ, tl.sum(read, axis=0).to(tl.int64), sem="relaxed")
    tl.debug_barrier()  # the whole part is stored before it counts as done
    done = tl.atomic_add(DONE + row, 1, sem="acq_rel", scope="gpu")
    if done == parts - 1:
        tl.store(DONE + row, 0)  # ready for the next launch
        merge(
            PARTS, LSE, SINKS, OUT, OUT_LSE, row, parts, lists, q_len, GROUP, VALUE_DIM,
            VALUE_SLOTS, HAS_SINKS, HEADS, MERGED,
        )  # fmt: skip


@triton.jit
def merge(
    PARTS, LSE, SINKS, OUT, OUT_LSE, row, parts, lists, q_len,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_SLOTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HEADS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a row: OUT (batch, heads, q_len, VALUE_DIM) and its natural log-sum-exp,
    OUT_LSE (batch, heads, q_len).

    HEADS: GROUP rounded up to a power of 2; MERGED parts at a time. SINKS (heads): logits that take
    weight and have no value; without them tokens of no weight give NaN, as 0 / 0 in a softmax.
    Parts are loaded past the first cache, which other programs do not write through.
    """
    batch = row // (lists * q_len)
    query = row % q_len
    member = tl.arange(0, HEADS)
    head = row // q_len % lists * GROUP + member
    block = tl.arange(0, MERGED)
    value_dim = tl.arange(0, VALUE_SLOTS)
    lses = LSE + (row.to(tl.int64) * GROUP + member)[:, None] * parts
    outs = PARTS + (row.to(tl.int64) * GROUP + member)[:, None, None] * parts * VALUE_DIM
    outs += value_dim[None, None, :]
    highest = tl.full([HEADS], -float("inf"), tl.float32)
    if HAS_SINKS:
        sinks = tl.load(SINKS + head, mask=member < GROUP, other=0.0).to(tl.float32) * LOG2_E
        highest = sinks
    for start in range(0, parts, MERGED):
        inside = (member < GROUP)[:, None] & (start + block < parts)[None, :]
        lse = tl.load(lses + (start + block)[None, :], mask=inside, other=-float("inf"),
                      cache_modifier=".cg")  # fmt: skip
        highest = tl.maximum(highest, tl.max(lse, axis=1))
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros([HEADS], tl.float32)
    if HAS_SINKS:
        total += tl.exp2(sinks - safe)
    out = tl.zeros([HEADS, VALUE_SLOTS], tl.float32)
    for start in range(0, parts, MERGED):
        inside = (member < GROUP)[:, None] & (start + block < parts)[None, :]
        lse = tl.load(lses + (start + block)[None, :], mask=inside, other=-float("inf"),
                      cache_modifier=".cg")  # fmt: skip
        weight = tl.exp2(lse - safe[:, None])
        inside = inside[:, :, None] & (value_dim < VALUE_DIM)[None, None, :]
        part = tl.load(outs + (start + block)[None, :, None] * VALUE_DIM, mask=inside, other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        total += tl.sum(weight, axis=1)
        out += tl.sum(weight[:, :, None] * part, axis=1)
    weightless = highest == LOWEST
    if not HAS_SINKS:
        out = tl.where(weightless[:, None], float("nan"), out)
    empty = weightless | (total == 0)
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = (safe + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E
    place = (batch.to(tl.int64) * lists * GROUP + head) * q_len + query
    inside = (member < GROUP)[:, None] & (value_dim < VALUE_DIM)[None, :]
    tl.store(OUT + place[:, None] * VALUE_DIM + value_dim[None, :],
             out.to(OUT.dtype.element_ty), mask=inside)  # fmt: skip
    tl.store(OUT_LSE + place, tl.where(empty, -float("inf"), lse), mask=member < GROUP)

"""Every stage the simple way: one program a row, tokens as the API lays them out, no tricks.

The fast kernels are held against these, on a GPU and in the interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashattn_kernels.maps import Maps
from hashattn_kernels.triton_gpu.bits import popcount
from hashattn_kernels.triton_gpu.encoding import activate
from hashattn_kernels.triton_gpu.launch import on, pack

BLOCK = tl.constexpr(32)


@triton.jit
def encode_kernel(X, WEIGHTS, BIASES, CODES, maps, share, n, IN: tl.constexpr, SLOTS: tl.constexpr,
                  HIDDEN: tl.constexpr, BITS: tl.constexpr, BIT_SLOTS: tl.constexpr,
                  DEPTH: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """The code of one vector by one map. X (batch, heads, n, IN), CODES (batch, maps, n, words);
    grid (n, maps, batch)."""
    token = tl.program_id(0)
    index = tl.program_id(1)
    batch = tl.program_id(2)
    dim = tl.arange(0, SLOTS)
    bit = tl.arange(0, BIT_SLOTS)
    row = (batch * (maps // share) + index // share) * n + token
    x = tl.load(X + row * IN + dim, mask=dim < IN, other=0.0).to(tl.float32)
    stage = WEIGHTS + index * (SLOTS * HIDDEN + (DEPTH - 2) * HIDDEN * HIDDEN + HIDDEN * BIT_SLOTS)
    bias = BIASES + index * ((DEPTH - 1) * HIDDEN + BIT_SLOTS)
    hidden = tl.arange(0, HIDDEN)
    for depth in tl.static_range(DEPTH - 1):
        inner = dim if depth == 0 else hidden
        weight = tl.load(stage + inner[:, None] * HIDDEN + hidden[None, :]).to(tl.float32)
        x = activate(tl.sum(x[:, None] * weight, axis=0) + tl.load(bias + hidden), ACTIVATION)
        stage += (SLOTS if depth == 0 else HIDDEN) * HIDDEN
        bias += HIDDEN
    weight = tl.load(stage + hidden[:, None] * BIT_SLOTS + bit[None, :]).to(tl.float32)
    ones = tl.sum(x[:, None] * weight, axis=0) + tl.load(bias + bit) > 0
    out = CODES + ((batch * maps + index) * n + token) * (BITS // 32)
    for word in tl.static_range(BITS // 32):
        mine = (bit // 32 == word) & ones
        tl.store(out + word, tl.sum(tl.where(mine, 1 << (bit % 32), 0), axis=0))


@triton.jit
def distance_kernel(QUERIES, KEYS, DISTANCES, lists, share, q_len, n, GROUP: tl.constexpr,
                    WORDS: tl.constexpr):  # fmt: skip
    """Summed Hamming distances (batch, lists, q, n) of the GROUP query heads of a list; grid
    (batch * lists * q)."""
    row = tl.program_id(0)
    batch, member, query = row // (lists * q_len), row // q_len % lists, row % q_len
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        keys = KEYS + ((batch * (lists // share) + member // share) * n + token) * WORDS
        total = tl.zeros([BLOCK], tl.int32)
        for head in range(GROUP):
            queries = QUERIES + (((batch * lists + member) * GROUP + head) * q_len + query) * WORDS
            for word in range(WORDS):
                key = tl.load(keys + word, mask=token < n, other=0)
                total += popcount(key ^ tl.load(queries + word))
        tl.store(DISTANCES + row * n + token, total, mask=token < n)


@triton.jit
def histogram_kernel(DISTANCES, CHOOSABLE, HISTOGRAM, n, bins):
    """How many tokens [low, high) of CHOOSABLE (rows, 2) have each distance; grid (rows)."""
    row = tl.program_id(0)
    low, high = tl.load(CHOOSABLE + 2 * row), tl.load(CHOOSABLE + 2 * row + 1)
    for token in range(low, high):
        counter = HISTOGRAM + row * bins + tl.load(DISTANCES + row * n + token)
        tl.store(counter, tl.load(counter) + 1)


@triton.jit
def threshold_kernel(HISTOGRAM, HEAVY, PLAN, bins):
    """PLAN (rows, 2): the distance up to which tokens are taken, and how many of those on it;
    HEAVY (rows): tokens to take; grid (rows)."""
    row = tl.program_id(0)
    heavy = tl.load(HEAVY + row)
    nearer = 0
    threshold = 0
    count = tl.load(HISTOGRAM + row * bins)
    while (nearer + count < heavy) & (threshold < bins - 1):
        nearer += count
        threshold += 1
        count = tl.load(HISTOGRAM + row * bins + threshold)
    tl.store(PLAN + 2 * row, threshold)
    tl.store(PLAN + 2 * row + 1, tl.minimum(heavy - nearer, count))


@triton.jit
def compact_kernel(DISTANCES, SEEN, CHOOSABLE, PLAN, INDICES, n, width):
    """The list of a row, token by token: SEEN and CHOOSABLE (rows, 2) are ranges [first, last), and
    INDICES (rows, width) holds -1 before; grid (rows)."""
    row = tl.program_id(0)
    low, high = tl.load(CHOOSABLE + 2 * row), tl.load(CHOOSABLE + 2 * row + 1)
    threshold, ties = tl.load(PLAN + 2 * row), tl.load(PLAN + 2 * row + 1)
    position = row * width
    for token in range(tl.load(SEEN + 2 * row), tl.load(SEEN + 2 * row + 1)):
        distance = tl.load(DISTANCES + row * n + token)
        choosable = (token >= low) & (token < high)
        tied = choosable & (distance == threshold) & (ties > 0)
        if tied | (choosable & (distance < threshold)) | (choosable == 0):
            tl.store(INDICES + position, token)
            position += 1
        ties -= tied.to(tl.int32)


@triton.jit
def union_kernel(INDICES, UNION, members, q_len, width, n, wide):
    """The tokens that any of a group's lists names, ascending; UNION (rows, wide) holds -1 before;
    grid (batch * lists * q)."""
    row = tl.program_id(0)
    position = row * wide
    for token in range(n):
        named = 0
        for member in range(members):
            indices = INDICES + ((row // q_len * members + member) * q_len + row % q_len) * width
            for start in range(0, width, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                index = tl.load(indices + slot, mask=slot < width, other=-1)
                named += tl.sum((index == token).to(tl.int32), axis=0)
        if named > 0:
            tl.store(UNION + position, token)
            position += 1


@triton.jit
def attend_kernel(Q, K, V, INDICES, OUT, LSE, scale, lists, share, q_len, n, width,
                  GROUP: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Attention of one query head over its list, token by token, the softmax in two passes: its
    highest logit, then the sums; grid (batch * lists * GROUP * q)."""
    at = tl.program_id(0)
    head, query = at // q_len, at % q_len
    dim = tl.arange(0, SLOTS)
    inside = dim < DIM
    q = tl.load(Q + at * DIM + dim, mask=inside, other=0.0).to(tl.float32)
    member = head // GROUP
    base = (member // lists * (lists // share) + member % lists // share) * n
    indices = INDICES + (member * q_len + query) * width
    highest = -float("inf")
    for slot in range(width):
        token = tl.load(indices + slot)
        if token >= 0:
            key = tl.load(K + (base + token) * DIM + dim, mask=inside, other=0.0).to(tl.float32)
            highest = tl.maximum(highest, tl.sum(q * key, axis=0) * scale)
    total = 0.0
    out = tl.zeros([SLOTS], tl.float32)
    for slot in range(width):
        token = tl.load(indices + slot)
        if token >= 0:
            row = (base + token) * DIM + dim
            key = tl.load(K + row, mask=inside, other=0.0).to(tl.float32)
            weight = tl.exp(tl.sum(q * key, axis=0) * scale - highest)
            total += weight
            out += weight * tl.load(V + row, mask=inside, other=0.0).to(tl.float32)
    out = out / tl.where(total == 0, 1.0, total)
    tl.store(OUT + at * DIM + dim, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + at, highest + tl.log(tl.where(total == 0, 1.0, total)))


def encode(x: Tensor, maps: Maps) -> Tensor:
    """As api.encode, for maps of at least two stages."""
    batch, heads, n, _ = x.shape
    packed = pack(maps, maps)
    codes = torch.empty(batch, maps.heads, n, maps.bits // 32, dtype=torch.int32, device=x.device)
    sizes = dict(packed.constants)
    sizes["SLOTS"] = sizes.pop("IN_SLOTS")
    with on(x):
        encode_kernel[(n, maps.heads, batch)](
            x.contiguous(), packed.weights, packed.biases, codes, maps.heads, maps.heads // heads,
            n, **sizes,
        )  # fmt: skip
    return codes


def distances(query_codes: Tensor, key_codes: Tensor, lists: int) -> Tensor:
    """Summed Hamming distances (batch, lists, q, n) int32."""
    batch, heads, q_len, words = query_codes.shape
    n = key_codes.shape[2]
    out = torch.empty(batch, lists, q_len, n, dtype=torch.int32, device=key_codes.device)
    with on(out):
        distance_kernel[(batch * lists * q_len,)](
            query_codes.contiguous(), key_codes.contiguous(), out, lists,
            lists // key_codes.shape[1], q_len, n, GROUP=heads // lists, WORDS=words,
        )  # fmt: skip
    return out


def histogram(found: Tensor, choosable: Tensor, bins: int) -> Tensor:
    """Counts (rows, bins) int32 of distances (rows, n) at tokens [low, high) of choosable."""
    rows, n = found.shape
    counts = torch.zeros(rows, bins, dtype=torch.int32, device=found.device)
    with on(found):
        histogram_kernel[(rows,)](found, choosable, counts, n, bins)
    return counts


def threshold(counts: Tensor, heavy: Tensor) -> Tensor:
    """(rows, 2) int32: the threshold for `heavy` (rows) tokens, and how many are taken on it."""
    rows, bins = counts.shape
    plan = torch.empty(rows, 2, dtype=torch.int32, device=counts.device)
    with on(counts):
        threshold_kernel[(rows,)](counts, heavy, plan, bins)
    return plan


def compact(found: Tensor, seen: Tensor, choosable: Tensor, plan: Tensor, width: int) -> Tensor:
    """Lists (rows, width) int32 by distances (rows, n) and what `threshold` planned."""
    rows, n = found.shape
    indices = torch.full((rows, width), -1, dtype=torch.int32, device=found.device)
    with on(found):
        compact_kernel[(rows,)](found, seen, choosable, plan, indices, n, width)
    return indices


def select_by_codes(
    query_codes: Tensor,
    key_codes: Tensor,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    lists: int,
    width: int,
) -> Tensor:
    """As api.select_by_codes, with all stages apart."""
    batch, heads, q_len, words = query_codes.shape
    found = distances(query_codes, key_codes, lists).flatten(0, 2)
    seen = spans[:, None].expand(-1, lists, -1, -1).reshape(-1, 2)
    first, last = seen[:, 0], torch.maximum(seen[:, 0], seen[:, 1])
    low = torch.minimum(first + sink, last)
    high = torch.maximum(last - local, low)
    choosable = torch.stack((low, high), dim=1).int()
    heavy = torch.minimum(heavy.reshape(-1), high - low).int()
    counts = histogram(found, choosable, 32 * words * heads // lists + 1)
    seen = torch.stack((first, last), dim=1).int()
    indices = compact(found, seen, choosable, threshold(counts, heavy), width)
    return indices.reshape(batch, lists, q_len, width)


def union(indices: Tensor, lists: int, n: int) -> Tensor:
    """As api.union, as wide as a union can be."""
    batch, before, q_len, width = indices.shape
    wide = min(n, width * before // lists)
    union = torch.full((batch, lists, q_len, wide), -1, dtype=torch.int32, device=indices.device)
    with on(indices):
        union_kernel[(batch * lists * q_len,)](
            indices.contiguous(), union, before // lists, q_len, width, n, wide
        )
    return union


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As api.attend with its log-sum-exp, without softcap and sinks; K and V of one head dim."""
    batch, heads, q_len, dim = q.shape
    lists, n = indices.shape[1], k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, q_len, device=q.device)
    with on(q):
        attend_kernel[(batch * heads * q_len,)](
            q.contiguous(), k.contiguous(), v.contiguous(), indices.contiguous(), out, lse,
            scaling, lists, lists // k.shape[1], q_len, n, indices.shape[3],
            GROUP=heads // lists, DIM=dim, SLOTS=triton.next_power_of_2(dim),
        )  # fmt: skip
    return out, lse

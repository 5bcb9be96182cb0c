"""Kernels for tensors in main memory in numpy and torch, for where numba is not installed.

Popcounts and histograms are numpy's, gathers and products torch's; selection equals the reference
bit for bit. Shapes: see `api`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .codes import Codes, tokens_of
from .reference import (
    attend_rows,
    encode,
    encode_graded,
    grade_bits,
    quantise,
    sample,
    sample_by_codes,
    union,
)

__all__ = [
    "attend", "attend_rows", "dense_decode", "encode", "encode_graded", "grade_bits",
    "hamming_scores", "quantise", "sample", "sample_by_codes", "select", "select_by_codes", "union",
]  # fmt: skip

WORD = reference.WORD


def hamming_scores(query_codes: Tensor, key_codes: Tensor, lists: int) -> Tensor:
    """Matching bits with numpy's popcount, one list at a time to stay in cache."""
    if query_codes.dim() == 5:
        return _graded_scores(query_codes, key_codes)
    batch, heads, q_len, words = query_codes.shape
    key_heads, n = key_codes.shape[1:3]
    group = heads // lists
    lane = np.uint64 if words % 2 == 0 else np.uint32  # two words in one operation
    grouped = query_codes.reshape(batch, lists, group, q_len, words)
    queries = np.ascontiguousarray(grouped.numpy()).view(lane)
    keys = np.ascontiguousarray(key_codes.numpy()).view(lane)
    matches = np.full((batch, lists, q_len, n), group * words * WORD, dtype=np.int32)
    for b, h in np.ndindex(batch, lists):
        columns = np.ascontiguousarray(keys[b, h * key_heads // lists].T)  # (lanes, n)
        for member, at in np.ndindex(group, len(columns)):
            differing = queries[b, h, member, :, at, None] ^ columns[at]
            matches[b, h] -= np.bitwise_count(differing)
    return torch.from_numpy(matches)


def _graded_scores(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """As the reference, with numpy's unpacking: signed weights of the ones among a key's bits, and
    the weights of the bits that are zero in the query."""
    batch, lists, q_len, words, slots = query_codes.shape
    code_heads, bits = key_codes.shape[1], words * WORD
    if 2 * bits * (2 ** (slots - 1) - 1) > 2**24:  # not exact in float32
        return reference.hamming_scores(query_codes, key_codes, lists)
    digits = _unpacked(query_codes.movedim(-1, 0)).float()
    weights = (digits[1:] * 2.0 ** torch.arange(slots - 1).view(-1, 1, 1, 1, 1)).sum(0)
    signed = torch.where(digits[0] > 0, weights, -weights)
    grouped = signed.reshape(batch, code_heads, -1, bits)
    ones = grouped @ _unpacked(key_codes).float().mT
    zeros = (weights - signed).sum(-1, keepdim=True) / 2  # weights of the query's zeros
    return (ones.reshape(batch, lists, q_len, -1) + zeros).to(torch.int32)


def _unpacked(codes: Tensor) -> Tensor:
    """Bits (..., bits) uint8 of codes (..., words) int32."""
    octets = np.ascontiguousarray(codes.numpy()).view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=-1, bitorder="little"))


def select_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    lists: int,
    width: int,
    most: int | None = None,
) -> Tensor:
    """One row at a time: distances in bytes, threshold by counting, compaction."""
    batch, heads, q_len, words = query_codes.shape[:4]
    keys = tokens_of(key_codes)
    shape = (batch, lists, heads // lists, q_len, words, *query_codes.shape[4:])
    queries = query_codes.numpy().view(np.uint32).reshape(shape)
    shared = lists // keys.shape[1]
    indices = np.full((batch, lists, q_len, width), -1, dtype=np.int32)
    for b, line in np.ndindex(batch, lists):
        codes = keys[b, line // shared].numpy().view(np.uint32)  # (n, words)
        for row in range(q_len):
            first, last = spans[b, row].tolist()
            low = min(first + sink, last)
            high = max(last - local, low)
            distances = _distances(queries[b, line, :, row], codes[low:high])
            best = low + _smallest(distances, int(heavy[b, line, row]))
            tokens = np.concatenate((np.arange(first, low), best, np.arange(high, last)))
            indices[b, line, row, : len(tokens)] = tokens
    return torch.from_numpy(indices)


def _distances(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bits in which codes (n, words) differ from queries (group, words), summed: (n,).

    Of a graded query (1, words, 1 + planes), their weights.
    """
    if queries.ndim == 3:
        return _graded_distances(queries[0], codes)
    group, words = queries.shape
    total = np.zeros(len(codes), dtype=np.min_scalar_type(group * words * WORD))
    for member, word in np.ndindex(group, words):
        total += np.bitwise_count(codes[:, word] ^ queries[member, word])
    return total


def _graded_distances(query: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Weights of the bits in which codes (n, words) differ from query (words, 1 + planes): (n,)."""
    words, slots = query.shape
    kind = np.min_scalar_type(words * WORD * (2 ** (slots - 1) - 1))
    total = np.zeros(len(codes), dtype=kind)
    for word in range(words):
        differing = codes[:, word] ^ query[word, 0]
        for plane in range(slots - 1):
            ones = np.bitwise_count(differing & query[word, 1 + plane])
            total += ones.astype(kind) << plane
    return total


def _smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Positions (k,) of the k smallest of values (n,), small integers; ties to the lowest."""
    if k >= len(values):
        return np.arange(len(values))
    if k == 0:
        return np.arange(0)
    low, high, below = 0, int(values.max()), 0
    while low < high:  # bisection for the k-th smallest
        middle = (low + high) // 2
        count = np.count_nonzero(values <= middle)
        if count >= k:
            high = middle
        else:
            low, below = middle + 1, count
    mask = values < low
    mask[np.flatnonzero(values == low)[: k - below]] = True
    return np.flatnonzero(mask)


def select(scores: Tensor, k: Tensor, candidates: Tensor, mandatory: Tensor) -> Tensor:
    """Threshold at the k-th best value, compaction, ties to the lowest index."""
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    shape, n = scores.shape, scores.shape[-1]
    candidates = candidates & ~mandatory
    if scores.is_floating_point():
        candidates = candidates & (scores != -torch.inf)
    allowed = candidates.expand(shape).numpy().reshape(-1, n)
    selected = mandatory.expand(shape).numpy().reshape(-1, n).copy()
    values = scores.detach().numpy().reshape(-1, n)
    budgets = k.numpy().reshape(-1)
    for row, budget in enumerate(budgets):
        _add_best(values[row], int(budget), allowed[row], selected[row])
    indices = _mask_to_indices(selected)
    return torch.from_numpy(indices.reshape(*shape[:-1], indices.shape[1]))


def _add_best(scores: np.ndarray, k: int, allowed: np.ndarray, selected: np.ndarray) -> None:
    """Add the k best allowed tokens of one row (n,) to the mask `selected`."""
    pool = scores[allowed]
    if k == 0:
        return
    if k >= len(pool):
        selected |= allowed
        return
    threshold = _kth_largest(pool, k)
    above = allowed & (scores > threshold)
    level = np.flatnonzero(allowed & (scores == threshold))
    selected |= above
    selected[level[: k - np.count_nonzero(above)]] = True


def _kth_largest(values: np.ndarray, k: int) -> np.generic:
    """The k-th largest value: a histogram for integers in a narrow range, else a partition."""
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        if high - low < 4 * len(values):
            at_least = np.bincount(values - low)[::-1].cumsum()
            return values.dtype.type(high - int(np.searchsorted(at_least, k)))
    return np.partition(values, len(values) - k)[len(values) - k]


def _mask_to_indices(mask: np.ndarray) -> np.ndarray:
    """(rows, n) bool -> (rows, m) int32 positions of the true entries, -1 padded."""
    positions = [np.flatnonzero(row) for row in mask]
    width = max(map(len, positions), default=0)
    indices = np.full((len(positions), width), -1, dtype=np.int32)
    for row, tokens in enumerate(positions):
        indices[row, : len(tokens)] = tokens
    return indices


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One KV head at a time, or a masked dense product where the rows' lists outweigh the cache."""
    lists, q_len, width = indices.shape[1:]
    n = k.shape[2]
    if q_len == 1:
        return _attend_by_head(q, k, v, indices, scaling, softcap, sinks, log_weights)
    if log_weights is not None or lists // k.shape[1] * q_len * width < n:
        return reference.attend(q, k, v, indices, scaling, softcap, sinks, log_weights)
    unlisted = ~reference.indices_to_mask(indices, n)
    return reference.attend_masked(q, k, v, unlisted, scaling, softcap, sinks)


def _attend_by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.attend` of single rows, one KV head at a time, so that its rows stay in cache."""
    kv_heads, parts = k.shape[1], []
    group, lists = q.shape[1] // kv_heads, indices.shape[1] // kv_heads
    for head in range(kv_heads):
        members = slice(head * group, (head + 1) * group)
        own = slice(head * lists, (head + 1) * lists)
        added = None if log_weights is None else log_weights[:, own]
        states = [states[:, head : head + 1] for states in (k, v)]
        logits = None if sinks is None else sinks[members]
        parts.append(reference.attend(
            q[:, members], *states, indices[:, own], scaling, softcap, logits, added
        ))  # fmt: skip
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, dim=1), torch.cat(lse, dim=1)


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The query heads of a group as rows of one SDPA call, where that gives the result asked for.

    On a CPU, `enable_gqa` reads K and V once per query head: two to thirteen times as long.
    """
    if spans is not None or softcap is not None or sinks is not None or return_lse:
        return reference.dense_decode(q, k, v, spans, scaling, softcap, sinks, return_lse)
    batch, heads, _, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    out = F.scaled_dot_product_attention(grouped, k, v, scale=scaling)
    if not out.any(dim=-1).all():  # where all logits are -inf, SDPA may give 0 instead of NaN
        return reference.dense_decode(q, k, v, spans, scaling, softcap, sinks, return_lse)
    return out.reshape(batch, heads, 1, v.shape[-1]), None

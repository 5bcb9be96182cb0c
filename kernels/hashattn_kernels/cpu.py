"""Fast kernels for tensors in main memory; selection equals the reference bit for bit."""

import numpy as np
import torch
from torch import Tensor

from . import reference

WORD = reference.WORD


def hamming_scores(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Matching bits with numpy's popcount, one KV head at a time to stay in cache."""
    batch, heads, q_len, words = query_codes.shape
    key_heads, n = key_codes.shape[1:3]
    group = heads // key_heads
    lane = np.uint64 if words % 2 == 0 else np.uint32  # two words in one operation
    grouped = query_codes.reshape(batch, key_heads, group, q_len, words)
    queries = np.ascontiguousarray(grouped.numpy()).view(lane)
    keys = np.ascontiguousarray(key_codes.numpy()).view(lane)
    matches = np.full((batch, key_heads, q_len, n), group * words * WORD, dtype=np.int32)
    for b, h in np.ndindex(batch, key_heads):
        columns = np.ascontiguousarray(keys[b, h].T)  # (lanes, n)
        for member, at in np.ndindex(group, len(columns)):
            mixed = queries[b, h, member, :, at, None] ^ columns[at]
            matches[b, h] -= np.bitwise_count(mixed)
    return torch.from_numpy(matches)


def select(scores: Tensor, k: Tensor, candidates: Tensor, always: Tensor) -> Tensor:
    """Threshold at the k-th best value, compaction, ties to the lowest index."""
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    shape, n = scores.shape, scores.shape[-1]
    candidates = candidates & ~always
    if scores.is_floating_point():
        candidates = candidates & (scores != -torch.inf)
    allowed = candidates.expand(shape).numpy().reshape(-1, n)
    chosen = always.expand(shape).numpy().reshape(-1, n).copy()
    values = scores.detach().numpy().reshape(-1, n)
    budgets = np.broadcast_to(k.numpy()[:, None, :], shape[:-1]).reshape(-1)
    for row, budget in enumerate(budgets):
        _choose(values[row], int(budget), allowed[row], chosen[row])
    indices = _compact(chosen)
    return torch.from_numpy(indices.reshape(*shape[:-1], indices.shape[1]))


def _choose(scores: np.ndarray, k: int, allowed: np.ndarray, chosen: np.ndarray) -> None:
    """Set the k best allowed tokens of one row in `chosen`."""
    pool = scores[allowed]
    if k == 0:
        return
    if k >= len(pool):
        chosen |= allowed
        return
    threshold = _kth_largest(pool, k)
    above = allowed & (scores > threshold)
    level = np.flatnonzero(allowed & (scores == threshold))
    chosen |= above
    chosen[level[: k - np.count_nonzero(above)]] = True


def _kth_largest(values: np.ndarray, k: int) -> np.generic:
    """The k-th largest value: a histogram for integers in a narrow range, else a partition."""
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        if high - low < 4 * len(values):
            at_least = np.bincount(values - low)[::-1].cumsum()
            return values.dtype.type(high - int(np.searchsorted(at_least, k)))
    return np.partition(values, len(values) - k)[len(values) - k]


def _compact(chosen: np.ndarray) -> np.ndarray:
    """(rows, n) bool -> (rows, m) int32 positions of the true entries, -1 padded."""
    picked = [np.flatnonzero(row) for row in chosen]
    width = max((len(row) for row in picked), default=0)
    indices = np.full((len(picked), width), -1, dtype=np.int32)
    for slot, row in enumerate(picked):
        indices[slot, : len(row)] = row
    return indices


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Gather the lists, or mask one dense product where the rows' lists outweigh the cache."""
    lists, q_len, width = indices.shape[1:]
    gathered = lists // k.shape[1] * q_len * width
    if q_len == 1 or gathered < k.shape[2]:
        return reference.attend(q, k, v, indices, scaling, softcap, sinks)
    return _attend_masked(q, k, v, indices, scaling, softcap, sinks)


def _attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, q_len, dim = q.shape
    kv_heads, n = k.shape[1:3]
    lists = indices.shape[1]
    work = reference.working_dtype(q)
    stacked = q.reshape(batch, kv_heads, -1, dim).to(work)
    logits = reference.cap_logits(stacked @ k.to(work).transpose(-1, -2) * scaling, softcap)
    logits = logits.reshape(batch, lists, heads // lists, q_len, n)
    slots = torch.where(indices < 0, n, indices).to(torch.int64)
    unlisted = torch.ones(*indices.shape[:-1], n + 1, dtype=torch.bool).scatter_(-1, slots, False)
    if sinks is not None:
        sinks = sinks.reshape(1, lists, heads // lists, 1, 1)
    weights = reference.listed_softmax(logits, unlisted[:, :, None, :, :n], sinks)
    out = weights.reshape(batch, kv_heads, -1, n) @ v.to(work)
    return out.reshape(batch, heads, q_len, v.shape[-1]).to(q.dtype)

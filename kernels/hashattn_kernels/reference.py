"""Reference kernels in plain torch: they define the results of every other backend."""

import torch
from torch import Tensor

WORD = 32


def pack_bits(preactivations: Tensor) -> Tensor:
    """(..., bits) real -> (..., bits // 32) int32; bit i of a word is unit i > 0."""
    ones = (preactivations > 0).unflatten(-1, (-1, WORD)).to(torch.int64)
    shifts = torch.arange(WORD, device=ones.device)
    words = (ones << shifts).sum(dim=-1)
    return words.to(torch.int32)  # wraps: unit 31 becomes the sign bit


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """(..., words) int32 -> (..., bits) bool, the inverse of pack_bits."""
    shifts = torch.arange(WORD, device=codes.device, dtype=torch.int32)
    return ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :bits].bool()


def popcount(words: Tensor) -> Tensor:
    """Ones in each int32 (Hacker's Delight, figure 5-2); the masks undo sign extension."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


def hamming_scores(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Matching bits: (B, Hq, q, W) and (B, Hk, n, W) -> (B, Hk, q, n) int32.

    Query heads that share key codes are summed (scores of a group).
    """
    batch, heads, q_len, words = query_codes.shape
    key_heads, n = key_codes.shape[1:3]
    group = heads // key_heads
    grouped = query_codes.reshape(batch, key_heads, group, q_len, words)
    scores = torch.full(
        (batch, key_heads, q_len, n),
        group * words * WORD,
        dtype=torch.int32,
        device=key_codes.device,
    )
    for word in range(words):  # one word at a time keeps the scratch at (B, Hk, q, n)
        keys = key_codes[:, :, None, :, word]
        for member in range(group):
            scores -= popcount(grouped[:, :, member, :, word, None] ^ keys)
    return scores


def select(scores: Tensor, k: Tensor, candidates: Tensor, always: Tensor) -> Tensor:
    """All `always` tokens and the k best candidates -> (B, L, q, m) int32, ascending.

    Threshold at the k-th best value, then a prefix count over the tokens that equal it, so the
    lowest indices win ties whatever order a sort returns.
    """
    candidates = candidates & ~always
    if scores.is_floating_point():
        candidates = candidates & (scores != -torch.inf)
    candidates = candidates.expand(scores.shape)
    k = torch.minimum(k[:, None].to(torch.int64), candidates.sum(dim=-1))
    floor = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    masked = torch.where(candidates, scores, floor)
    widest = int(k.max()) if k.numel() else 0
    if widest:
        best = masked.topk(widest, dim=-1).values
        threshold = best.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1))
        above = candidates & (masked > threshold)
        level = candidates & (masked == threshold)
        room = (k - above.sum(dim=-1)).unsqueeze(-1)
        heavy = (above | (level & (level.cumsum(dim=-1) <= room))) & (k.unsqueeze(-1) > 0)
    else:
        heavy = torch.zeros_like(candidates)
    return compact(heavy | always)


def compact(chosen: Tensor) -> Tensor:
    """(..., n) bool -> (..., m) int32 positions of the true entries, ascending, -1 padded."""
    rows = chosen.reshape(-1, chosen.shape[-1])
    counts = rows.sum(dim=-1)
    width = int(counts.max()) if counts.numel() else 0
    row, token = rows.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(row.numel(), device=row.device) - starts[row]
    indices = torch.full((rows.shape[0], width), -1, dtype=torch.int32, device=rows.device)
    indices[row, slot] = token.to(torch.int32)
    return indices.reshape(*chosen.shape[:-1], width)


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """(B, Hkv, n, D) and indices (B, L, q, m) -> (B, L, q, m, D); padding repeats token 0.

    One flat index_select: K and V are never repeated for the query heads of a group.
    """
    batch, kv_heads, n, dim = states.shape
    lists = indices.shape[1]
    head = torch.arange(lists, device=states.device) // (lists // kv_heads)
    base = torch.arange(batch, device=states.device)[:, None] * kv_heads + head
    flat = indices.clamp(min=0).to(torch.int64) + (base * n)[:, :, None, None]
    return states.reshape(-1, dim).index_select(0, flat.reshape(-1)).reshape(*indices.shape, dim)


def working_dtype(q: Tensor) -> torch.dtype:
    """Softmax precision: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), as in Gemma 2; unchanged for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def listed_softmax(logits: Tensor, unlisted: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis without the unlisted tokens.

    sinks (broadcastable, last axis 1) only add to the sum. A row that lists no token, such as a
    query of padding, gets zeros instead of NaN.
    """
    logits = logits.masked_fill(unlisted, -torch.inf)
    if sinks is not None:
        sinks = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return weights.masked_fill(unlisted, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the listed tokens only -> (B, Hq, q, Dv)."""
    batch, heads, q_len, dim = q.shape
    lists = indices.shape[1]
    work = working_dtype(q)
    queries = q.reshape(batch, lists, heads // lists, q_len, dim).transpose(2, 3).to(work)
    keys = gather_tokens(k, indices).to(work)
    values = gather_tokens(v, indices).to(work)
    logits = cap_logits(queries @ keys.transpose(-1, -2) * scaling, softcap)  # (B, L, q, r, m)
    if sinks is not None:
        sinks = sinks.reshape(1, lists, 1, heads // lists, 1)
    out = listed_softmax(logits, indices[:, :, :, None] < 0, sinks) @ values
    return out.transpose(2, 3).reshape(batch, heads, q_len, v.shape[-1]).to(q.dtype)


def dense_decode(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """One query row over the whole cache, the group as rows of one KV head."""
    batch, heads, _, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, scale=scaling)
    return out.reshape(batch, heads, 1, v.shape[-1])

"""Public kernels: argument checks and the choice of a backend.

Shapes: queries (batch, heads, q, head_dim); keys and values (batch, kv_heads, n, head_dim);
codes (batch, kv_heads or heads, n, words) int32; indices (batch, lists, q, m) int32, ascending,
-1 for padding, lists = kv_heads or heads.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import cpu, reference

_BACKENDS = {"reference": reference, "cpu": cpu}


def pack_bits(preactivations: Tensor) -> Tensor:
    """Codes of pre-activations (..., bits) -> (..., bits // 32) int32.

    Bit i of word w is preactivations[..., 32 * w + i] > 0, unit 0 the least significant bit.
    Raises ValueError unless bits is a positive multiple of 32.
    """
    bits = preactivations.shape[-1]
    if bits == 0 or bits % reference.WORD:
        raise ValueError(f"bits={bits}: must be a positive multiple of {reference.WORD}")
    return reference.pack_bits(preactivations)


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bits of codes (..., words) -> (..., bits) bool, the inverse of pack_bits."""
    if bits != codes.shape[-1] * reference.WORD:
        raise ValueError(
            f"bits={bits}: codes of {codes.shape[-1]} words hold "
            f"{codes.shape[-1] * reference.WORD} bits"
        )
    return reference.unpack_bits(codes, bits)


def hamming_scores(query_codes: Tensor, key_codes: Tensor, *, backend: str | None = None) -> Tensor:
    """Matching bits of query codes (B, Hq, q, W) and key codes (B, Hk, n, W), int32.

    Hk == Hq: (B, Hq, q, n), bits - Hamming distance. Hk == kv_heads: (B, Hk, q, n), summed over
    the query heads of the group.
    """
    for name, codes in (("query_codes", query_codes), ("key_codes", key_codes)):
        if codes.dim() != 4 or codes.dtype != torch.int32:
            raise ValueError(
                f"{name}: expected int32 (batch, heads, tokens, words), got {codes.dtype} "
                f"{tuple(codes.shape)}"
            )
    _check_heads("query_codes", query_codes.shape[1], "key_codes", key_codes.shape[1])
    if query_codes.shape[-1] != key_codes.shape[-1]:
        raise ValueError(
            f"query_codes have {query_codes.shape[-1]} words, key_codes {key_codes.shape[-1]}: "
            "encode both with the same bits"
        )
    return _backend(key_codes, backend).hamming_scores(query_codes, key_codes)


def select(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor,
    always: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Indices (B, L, q, m) int32 of all `always` tokens and the k best other candidates.

    scores (B, L, q, n), larger is better, ties go to the lowest index; a float score of -inf is
    never selected, NaN raises ValueError. k: int or (B, q). candidates, always: bool
    (B or 1, 1 or L, q or 1, n). Indices ascend; -1 pads shorter rows.
    """
    if scores.dim() != 4 or scores.dtype == torch.bool or scores.is_complex():
        raise ValueError(
            f"scores: expected real (batch, lists, q, n), got {scores.dtype} {tuple(scores.shape)}"
        )
    if scores.is_floating_point() and scores.isnan().any():
        raise ValueError("scores contain NaN: the selector or its inputs overflowed")
    batch, _, q_len, _ = scores.shape
    k = torch.as_tensor(k, device=scores.device)
    if k.is_floating_point() or k.dim() not in (0, 2) or bool((k < 0).any()):
        raise ValueError("k: expected a non-negative integer or an integer tensor (batch, q)")
    k = k.expand(batch, q_len)
    return _backend(scores, backend).select(scores, k, candidates, always)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of q over the listed tokens -> (B, Hq, q, Dv) in q's dtype.

    The softmax runs in float32. indices (B, L, q, m) with L = kv_heads or heads; a row without
    tokens gives zeros. softcap: Gemma 2's logit cap. sinks: (heads,) extra logits of the softmax
    sum (gpt-oss).
    """
    _check_heads("q", q.shape[1], "k", k.shape[1])
    lists = indices.shape[1]
    if indices.dim() != 4 or lists not in (q.shape[1], k.shape[1]):
        raise ValueError(
            f"indices: expected (batch, {k.shape[1]} or {q.shape[1]} lists, q, m), "
            f"got {tuple(indices.shape)}"
        )
    return _backend(q, backend).attend(q, k, v, indices, scaling, softcap, sinks)


def dense_decode(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Dense baseline for one query row (B, Hq, 1, D) -> (B, Hq, 1, Dv).

    The query heads of a group are rows of one SDPA call: `enable_gqa` walks K and V once per
    query head on a CPU, which would flatter every sparse method.
    """
    _check_heads("q", q.shape[1], "k", k.shape[1])
    if q.shape[2] != 1:
        raise ValueError(f"q has {q.shape[2]} rows: dense_decode takes one")
    return reference.dense_decode(q, k, v, scaling)


def _check_heads(name: str, heads: int, other: str, fewer: int) -> None:
    if fewer == 0 or heads % fewer:
        raise ValueError(f"{name} has {heads} heads, not a multiple of the {fewer} of {other}")


def _backend(tensor: Tensor, name: str | None) -> ModuleType:
    if name is None:
        name = "cpu" if tensor.device.type == "cpu" else "reference"
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {sorted(_BACKENDS)}")
    if name == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"backend='cpu' needs tensors in main memory, got {tensor.device}")
    return _BACKENDS[name]

"""Public kernels: argument checks and the choice of a backend.

Shapes: queries (batch, heads, q, head_dim); keys and values (batch, kv_heads, n, head_dim); codes
(batch, kv_heads or heads, n, words) int32; graded query codes (batch, lists, q, words, 1 + planes)
int32; indices (batch, lists, q, m) int32, ascending, -1 for padding, lists = kv_heads or heads;
spans (batch, q, 2) int64, the tokens [first, last) that a query row sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .backends import backend_for
from .codes import Codes, check, tokens_of
from .coins import DEAREST, Coins, parts_of
from .maps import Maps
from .quantised import RowFormat, check_rows, rotate, rotate_back


def pack_bits(preactivations: Tensor) -> Tensor:
    """Codes of pre-activations (..., bits) -> (..., bits // 32) int32.

    Bit i of word w is preactivations[..., 32 * w + i] > 0, unit 0 the least significant bit.
    Raises ValueError unless bits is a positive multiple of 32.
    """
    _check_bits(preactivations.shape[-1])
    return reference.pack_bits(preactivations)


def grade_bits(
    preactivations: Tensor, planes: int = 5, most: int = 255, *, backend: str | None = None
) -> Tensor:
    """Graded codes of pre-activations (..., bits) -> (..., bits // 32, 1 + planes) int32.

    A code keeps only the sign of each unit; a graded one also its size, as a weight that is
    |p_i| times a factor, rounded: the largest with which the weights sum to at most `most` and none
    needs more than `planes` binary digits. Slot 0 of the last axis holds pack_bits, slot 1 + j the
    j-th digits of the weights. For queries, which are not stored: keys keep plain codes.
    Raises ValueError unless bits is a positive multiple of 32, planes within 1..8 and most within
    bits..65535.
    """
    _check_bits(preactivations.shape[-1])
    _check_grades(preactivations.shape[-1], planes, most)
    module = backend_for(preactivations, backend, "grade_bits", preactivations)
    return module.grade_bits(preactivations, planes, most)


def grade_step(preactivations: Tensor, planes: int = 5, most: int = 255) -> Tensor:
    """What a unit of weight of `grade_bits` stands for: (..., bits) -> (...) float32.

    The weights are |p_i| / step, rounded: the step is the smallest with which they fit both bounds.
    """
    return reference.grade_step(preactivations, planes, most)


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bits of codes (..., words) int32 -> (..., bits) bool, the inverse of pack_bits.

    ValueError unless bits is what the words hold.
    """
    words = codes.shape[-1]
    if bits != words * reference.WORD:
        raise ValueError(
            f"bits = {bits}: must be {words * reference.WORD}, what codes of {words} words hold"
        )
    return reference.unpack_bits(codes, bits)


def preactivations(x: Tensor, maps: Maps) -> Tensor:
    """x (..., heads, n, in) through one map a head -> (..., heads, n, bits) float32, in torch.

    Differentiable: training relaxes the signs that `encode` takes.
    """
    return reference.preactivations(x, maps)


def encode(x: Tensor, maps: Maps, *, backend: str | None = None) -> Tensor:
    """Codes (B, maps, n, words) int32 of vectors x (B, heads, n, in), fused where the backend can.

    The batch axis may be missing from both. maps / heads maps read the same head, as when every
    query head has a key map of its own. Backends sum in different orders: a bit may differ where
    its pre-activation is within rounding of 0. ValueError for x and maps that do not fit.
    """
    if x.dim() == 3:
        return encode(x[None], maps, backend=backend)[0]
    _check_vectors("x", x, maps)
    return backend_for(x, backend, "encode", x).encode(x, maps)


def encode_pair(
    queries: Tensor, query_maps: Maps, keys: Tensor, key_maps: Maps, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of a decode step's queries and of its new keys: two `encode`s, in one launch where the
    backend can.

    queries (B, heads, q, in), keys (B, kv_heads, new, in) -> (B, query maps, q, words) and
    (B, key maps, new, words) int32.
    """
    _check_vectors("queries", queries, query_maps)
    _check_vectors("keys", keys, key_maps)
    module = backend_for(queries, backend, "encode", queries, keys)
    fused = getattr(module, "encode_pair", None)
    if fused is not None:
        return fused(queries, query_maps, keys, key_maps)
    return module.encode(queries, query_maps), module.encode(keys, key_maps)


def encode_graded(
    x: Tensor, maps: Maps, lists: int, planes: int = 5, most: int = 255, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Graded codes of queries x (B, heads, n, in) by a map each, (B, lists, n, words, 1 + planes)
    int32, and what a unit of their weights stands for (`grade_step`), (B, lists, n) float32.

    The pre-activations of the heads / lists heads that share a list are summed first. ValueError
    for x, maps or lists that do not fit, and as of `grade_bits`.
    """
    _check_vectors("x", x, maps)
    _check_heads("x", x.shape[1], "the lists", lists)
    if maps.heads != x.shape[1]:
        raise ValueError(f"{maps.heads} maps for {x.shape[1]} heads: a query head has one map")
    _check_grades(maps.bits, planes, most)
    return backend_for(x, backend, "encode", x).encode_graded(x, maps, lists, planes, most)


def hamming_scores(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    lists: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Matching bits of query codes (B, Hq, q, W) and key codes (B, Hc, n, W) -> (B, lists, q, n).

    int32, summed over the Hq / lists query heads of a list; lists is Hc unless given, and a
    multiple of Hc that divides Hq. Graded query codes (B, lists, q, W, 1 + planes): the sum of the
    matching bits' weights. ValueError for codes or lists that do not fit.
    """
    keys = tokens_of(key_codes)
    lists = _check_codes(query_codes, keys, lists)
    return backend_for(keys, backend, "hamming_scores").hamming_scores(query_codes, keys, lists)


def select(
    scores: Tensor,
    k: int | Tensor,
    candidates: Tensor,
    mandatory: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Indices (B, L, q, m) int32 of all `mandatory` tokens and the k best other candidates.

    scores (B, L, q, n), larger is better, ties go to the lowest index; a float score of -inf is
    never selected, NaN raises ValueError. k: int or (B, 1 or L, q). candidates, mandatory: bool
    (B or 1, 1 or L, q or 1, n). Indices ascend; -1 pads shorter rows.
    """
    if scores.dim() != 4 or scores.dtype == torch.bool or scores.is_complex():
        raise ValueError(
            f"scores: expected real (batch, lists, q, n), got {scores.dtype} {tuple(scores.shape)}"
        )
    if scores.is_floating_point() and scores.isnan().any():
        raise ValueError("scores contain NaN: the selector or its inputs overflowed")
    k = _check_heavy("k", k, scores.shape[:3], scores.device)
    return backend_for(scores, backend, "select").select(scores, k, candidates, mandatory)


def sample(
    costs: Tensor,
    certain: int | Tensor,
    drawn: int | Tensor,
    trust: float,
    coins: Tensor,
    candidates: Tensor,
    mandatory: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read some tokens for all: indices (B, L, q, m) int32, -1 padded, and their log weights.

    All `mandatory` tokens, the `certain` candidates of the least cost, and of the rest about
    `drawn`, each by its own coin with an inclusion probability in proportion to exp(-cost), but at
    most 1 and at least `trust` times that of a uniform sample (Poisson sampling with probabilities
    proportional to size; priority sampling without its fixed number, Duffield, Lund and Thorup,
    JACM 2007). With minus the logarithm of the probability added to a token's logit, the sums of
    the softmax are estimated without bias, whatever the costs say.

    costs (B, L, q, n) int64 in 1 / NAT nats, coins (B, L, q, n) int32 of `Coins.of`; certain and
    drawn: int or (B, 1 or L, q). Log weights (B, L, q, m) float32, 0 for what is certain.
    """
    shape = costs.shape[:3]
    certain = _check_heavy("certain", certain, shape, costs.device)
    drawn = _check_heavy("drawn", drawn, shape, costs.device)
    sampling = backend_for(costs, backend, "sample")
    return sampling.sample(costs, certain, drawn, parts_of(trust), coins, candidates, mandatory)


def sample_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    units: Tensor,
    certain: int | Tensor,
    drawn: int | Tensor,
    trust: float,
    coins: Coins,
    sink: int,
    local: int,
    *,
    spans: Tensor | None = None,
    width: int | None = None,
    most: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` straight from codes -> indices (B, lists, q, width) int32 and log weights, float32.

    units (B, lists, q) int64, from 1 to 2^14: what a unit of distance costs, in 1 / NAT nats. Other
    arguments as of `sample` and `select_by_codes`; coins: their counters. width: columns of the
    result; if None, room for six standard deviations more than is expected. Where that is not
    enough, the last tokens are left out.
    """
    lists = _check_codes(query_codes, key_codes, units.shape[1])
    units = units.clamp(1, DEAREST)
    batch, _, q_len = query_codes.shape[:3]
    n, device = key_codes.shape[2], query_codes.device
    shape = batch, lists, q_len
    certain = _check_heavy("certain", certain, shape, device)
    drawn = _check_heavy("drawn", drawn, shape, device)
    spans = causal_spans(batch, q_len, n, device) if spans is None else spans
    if width is None:
        width = min(n, sink + local + room_for(int(certain.max()), int(drawn.max())))
    module = backend_for(query_codes, backend, "sample_by_codes")
    return module.sample_by_codes(
        query_codes, key_codes, units, certain, drawn, parts_of(trust), coins, spans, sink, local,
        width, most,
    )  # fmt: skip


def room_for(certain: int, drawn: int) -> int:
    """Tokens that a sample of this expected size may have: six standard deviations more, and those
    of the survey that sets its threshold."""
    return certain + drawn + drawn // 4 + 6 * math.isqrt(drawn) + 8


def select_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    heavy: int | Tensor,
    sink: int,
    local: int,
    *,
    spans: Tensor | None = None,
    lists: int | None = None,
    width: int | None = None,
    most: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`select` by `hamming_scores`, without ever holding the scores -> (B, lists, q, width) int32.

    query_codes (B, Hq, q, W), or graded (see `grade_bits`); key_codes (B, Hc, n, W). Of the tokens
    that a row sees: the first `sink`, the last `local` and the `heavy` best others (an int, or
    (B, 1 or lists, q)), ties to the lowest index; ascending, -1 for padding. spans (B, q, 2): what
    rows see, causal if None. width: columns of the result; if None, the most that sink + heavy +
    local can fill, for which the call waits for a `heavy` on a GPU. ValueError if it is less.
    most: what graded queries' weights sum to at most, where `grade_bits` was told; if None, what
    their planes can hold: fewer levels are counted faster.
    """
    lists = _check_codes(query_codes, key_codes, lists)
    batch, _, q_len = query_codes.shape[:3]
    n = key_codes.shape[2]
    for name, value in (("sink", sink), ("local", local)):
        if value < 0:
            raise ValueError(f"{name} = {value}: must be an integer of at least 0")
    if width is None or not isinstance(heavy, Tensor):
        longest = max(heavy.flatten().tolist(), default=0) if isinstance(heavy, Tensor) else heavy
        needed = min(n, sink + local + longest)
        width = needed if width is None else width
        if width < needed:
            raise ValueError(f"width = {width}: must be at least {needed}, a row's most tokens")
    heavy = _check_heavy("heavy", heavy, (batch, lists, q_len), query_codes.device)
    spans = causal_spans(batch, q_len, n, query_codes.device) if spans is None else spans
    if spans.shape != (batch, q_len, 2) or spans.dtype != torch.int64:
        raise ValueError(
            f"spans: expected int64 ({batch}, {q_len}, 2), got {spans.dtype} {tuple(spans.shape)}"
        )
    module = backend_for(query_codes, backend, "select_by_codes")
    return module.select_by_codes(
        query_codes, key_codes, heavy, spans, sink, local, lists, width, most
    )


def union(indices: Tensor, lists: int, n: int, *, backend: str | None = None) -> Tensor:
    """Union of the token lists of each group: (B, L, q, m) -> (B, lists, q, at most m L / lists).

    Both int32. With one list for the query heads that share a KV head, each of its rows is read
    once, and every head attends to at least its own tokens. n: tokens in the cache. ValueError
    unless `lists` divides L.
    """
    _check_heads("indices", indices.shape[1], "the union", lists)
    return backend_for(indices, backend, "union").union(indices, lists, n)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    log_weights: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, Hq, q, D) over the listed tokens -> (B, Hq, q, Dv) in q's dtype.

    k (B, Hkv, n, D), v (B, Hkv, n, Dv); indices (B, L, q, m) int32 with L = Hkv or Hq. The softmax
    runs in float32; a row without tokens gives zeros. softcap: Gemma 2's logit cap. sinks (Hq,):
    extra logits of the softmax sum (gpt-oss). log_weights, shaped like indices, float: added to the
    tokens' logits, minus the log of the probability with which a token was sampled. return_lse:
    also the log of the softmax sum (B, Hq, q) float32, with which outputs over
    disjoint tokens are merged. ValueError for shapes that do not fit, IndexError for a token that
    the cache does not hold (not checked on a GPU).
    """
    _check_heads("q", q.shape[1], "k", k.shape[1])
    _check_lists(indices, log_weights, q.shape[1], k.shape[1])
    module = backend_for(q, backend, "attend", q, k, v)
    out, lse = module.attend(q, k, v, indices, scaling, softcap, sinks, log_weights)
    return (out, lse) if return_lse else out


def quantise(keys: Tensor, values: Tensor, bits: int, *, backend: str | None = None) -> Tensor:
    """Rows (B, kv_heads, n, width) uint8 of keys (B, kv_heads, n, D) and values (.., n, Dv): see
    quantised.py, and `RowFormat` for their width.

    A token's row depends on nothing but its own key and value. Backends sum in different orders: a
    code may differ by one where a number is within rounding of the middle of two. ValueError for
    shapes or dtypes that do not fit each other or a RowFormat, and for NaN or infinite numbers: on
    a GPU, which is not asked, the scale of such a vector is NaN, and so is what attends to it.
    """
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            "keys and values: expected (batch, kv_heads, n, head_dim) of the same tokens, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype != values.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}: must be the same")
    row_format = RowFormat(bits, keys.shape[3], values.shape[3], keys.dtype)
    keys, values = keys.detach(), values.detach()
    module = backend_for(keys, backend, "quantise", keys, values, row_format)
    return module.quantise(keys, values, row_format)


def attend_rows(
    q: Tensor,
    rows: Tensor,
    row_format: RowFormat,
    indices: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    log_weights: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` over the rows (B, Hkv, n, width) uint8 of `quantise`, decoded as they are read.

    indices: numbers of rows, in any order, with the padding of -1 behind them. A list gives the
    same output, bit for bit, in whatever order the rows lie. Other arguments, results and errors as
    of `attend`; ValueError also for rows that are not of row_format, and where its key_dim is not
    q's.
    """
    check_rows(rows, row_format)
    if rows.dim() != 4 or q.shape[3] != row_format.key_dim:
        raise ValueError(
            f"rows {tuple(rows.shape)} of keys of {row_format.key_dim}, q {tuple(q.shape)}: "
            "expected (batch, kv_heads, n, width) and (batch, heads, q, key_dim)"
        )
    _check_heads("q", q.shape[1], "rows", rows.shape[1])
    _check_lists(indices, log_weights, q.shape[1], rows.shape[1])
    module = backend_for(q, backend, "attend_rows", q, rows, row_format)
    out, lse = module.attend_rows(
        rotate(q), rows, row_format, indices, scaling, softcap, sinks, log_weights
    )
    out = rotate_back(out).to(q.dtype)
    return (out, lse) if return_lse else out


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    spans: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of one query row (B, Hq, 1, D) -> (B, Hq, 1, Dv): for the baseline, and for
    dense layers.

    spans (B, 1, 2): the tokens it sees, all if None. Else as `attend`.
    """
    _check_heads("q", q.shape[1], "k", k.shape[1])
    if q.shape[2] != 1:
        raise ValueError(f"q has {q.shape[2]} rows: dense_decode takes one")
    module = backend_for(q, backend, "dense_decode", q, k, v)
    out, lse = module.dense_decode(q, k, v, spans, scaling, softcap, sinks, return_lse)
    return (out, lse) if return_lse else out


def causal_spans(batch: int, q_len: int, n: int, device: torch.device | str) -> Tensor:
    """Spans (batch, q_len, 2) int64 of the last q_len of n tokens: each sees all up to itself."""
    last = torch.arange(n - q_len + 1, n + 1, device=device)
    return torch.stack((torch.zeros_like(last), last), dim=-1).expand(batch, q_len, 2)


def _check_bits(bits: int) -> None:
    if bits == 0 or bits % reference.WORD:
        raise ValueError(f"bits = {bits}: must be a positive multiple of {reference.WORD}")


def _check_grades(bits: int, planes: int, most: int) -> None:
    if not 1 <= planes <= 8:
        raise ValueError(f"planes = {planes}: must be an integer in 1..8")
    if not bits <= most <= 65535:
        raise ValueError(f"most = {most}: must be an integer in {bits}..65535")


def _check_heads(name: str, heads: int, other: str, fewer: int) -> None:
    if fewer == 0 or heads % fewer:
        raise ValueError(f"{name} has {heads} heads, not a multiple of the {fewer} of {other}")


def _check_lists(indices: Tensor, log_weights: Tensor | None, heads: int, kv_heads: int) -> None:
    if indices.dim() != 4 or indices.shape[1] not in (heads, kv_heads):
        raise ValueError(
            f"indices: expected (batch, {kv_heads} or {heads} lists, q, m), "
            f"got {tuple(indices.shape)}"
        )
    if log_weights is not None and log_weights.shape != indices.shape:
        raise ValueError(
            f"log_weights: expected the shape of indices, {tuple(indices.shape)}, got "
            f"{tuple(log_weights.shape)}"
        )


def _check_vectors(name: str, x: Tensor, maps: Maps) -> None:
    width = maps.weights[0].shape[1]
    if x.dim() != 4 or x.shape[3] != width:
        raise ValueError(f"{name}: expected (batch, heads, n, {width}), got {tuple(x.shape)}")
    _check_heads("maps", maps.heads, name, x.shape[1])
    if maps.bits % reference.WORD:
        raise ValueError(f"maps of {maps.bits} bits: must be a multiple of {reference.WORD}")


def _check_codes(query_codes: Tensor, key_codes: Tensor | Codes, lists: int | None) -> int:
    """The number of lists; ValueError if codes or lists do not fit together."""
    graded = query_codes.dim() == 5
    if graded and query_codes.shape[-1] < 2:
        raise ValueError("query_codes: graded codes hold signs and at least one plane of weights")
    check(query_codes[..., 0] if graded else query_codes, "query_codes")
    if isinstance(key_codes, Tensor):
        check(key_codes, "key_codes")
    heads, code_heads = query_codes.shape[1], key_codes.shape[1]
    _check_heads("query_codes", heads, "key_codes", code_heads)
    if query_codes.shape[3] != key_codes.shape[-1]:
        raise ValueError(
            f"query_codes have {query_codes.shape[3]} words, key_codes {key_codes.shape[-1]}: "
            "encode both with the same bits"
        )
    if graded and lists not in (None, heads):
        raise ValueError(f"lists = {lists}: must be {heads}, one for each graded query code")
    lists = heads if graded else code_heads if lists is None else lists
    if lists < 1 or lists % code_heads or heads % lists:
        raise ValueError(
            f"lists = {lists}: must be a multiple of the {code_heads} code heads that divides the "
            f"{heads} query heads"
        )
    return lists


def _check_heavy(
    name: str, heavy: int | Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """`heavy` as an int64 tensor of shape (batch, lists, q); values on a GPU are not checked."""
    counts = torch.as_tensor(heavy, device=device)
    known = counts.device.type == "cpu" or not isinstance(heavy, Tensor)
    batch, lists, q_len = shape
    fits = counts.dim() == 0 or tuple(counts.shape) in ((batch, 1, q_len), (batch, lists, q_len))
    if counts.is_floating_point() or not fits or (known and bool((counts < 0).any())):
        raise ValueError(
            f"{name}: expected a non-negative integer or an integer tensor (batch, 1 or lists, q), "
            f"({batch}, 1 or {lists}, {q_len}), got {_shown(heavy)}"
        )
    return counts.to(torch.int64).expand(shape)


def _shown(counts: int | Tensor) -> str:
    if not isinstance(counts, Tensor):
        return repr(counts)
    least = f", least {counts.min().item()}" if counts.numel() else ""
    return f"{counts.dtype} {tuple(counts.shape)}{least}"

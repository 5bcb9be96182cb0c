"""The kernels as `api` calls them (shapes there): no call waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..codes import Codes, Tiled, tokens_of
from ..coins import Coins
from ..maps import Maps
from ..quantised import RowFormat
from ..step import Drawing, Grades
from . import configs, launch, step
from .bits import INTERPRET
from .configs import DTYPES
from .scoring import levels

DIMS = 16  # head dims must be multiples of it
COUNTS_STEPS = True  # decode_step adds to `counters` itself
WORD_BYTES = 4
WIDEST = 256  # the largest head dim, hidden width or bits that a program holds

grade_bits = reference.grade_bits
# scores as such are for inspection: select_by_codes never stores them
hamming_scores = reference.hamming_scores
select = reference.select
quantise = reference.quantise  # once for a token


def supports(kernel: str, *arguments) -> bool:
    """Whether this backend runs `kernel` on these arguments (vectors to encode, q, k and v, or q,
    rows and their format)."""
    if kernel in ("grade_bits", "quantise"):
        return True
    if kernel == "attend_rows":
        _, rows, row_format = arguments
        widest = max(row_format.key_dim, row_format.value_dim)
        return (rows.is_cuda or INTERPRET.value) and widest <= WIDEST
    if not all(tensor.is_cuda or INTERPRET.value for tensor in arguments):
        return False
    if any(tensor.dtype not in DTYPES or tensor.shape[3] > WIDEST for tensor in arguments):
        return False
    if kernel in ("attend", "dense_decode", "decode_step"):
        q, k, v = arguments
        same = q.dtype == k.dtype == v.dtype
        return same and k.shape[3] % DIMS == 0 and v.shape[3] % DIMS == 0
    return True


def encode(x: Tensor, maps: Maps) -> Tensor:
    """Network, signs and packing in one launch."""
    if _widest(maps) > WIDEST:
        return reference.encode(x, maps)
    x, out = _rows_in_place(x), _codes_like(x, maps)
    launch.encode(x, maps, out)
    return out


def encode_pair(
    queries: Tensor, query_maps: Maps, keys: Tensor, key_maps: Maps
) -> tuple[Tensor, Tensor]:
    """Both stacks in one launch, if their widths are equal."""
    alike = (
        launch.alike(query_maps, key_maps)
        and queries.dtype == keys.dtype
        and queries.shape[0] == keys.shape[0]
    )
    if not alike or _widest(query_maps) > WIDEST:
        return encode(queries, query_maps), encode(keys, key_maps)
    queries, keys = _rows_in_place(queries), _rows_in_place(keys)
    out, key_out = _codes_like(queries, query_maps), _codes_like(keys, key_maps)
    launch.encode(queries, query_maps, out, (keys, key_maps, key_out))
    return out, key_out


def encode_graded(
    x: Tensor, maps: Maps, lists: int, planes: int, most: int
) -> tuple[Tensor, Tensor]:
    """Networks, sums over the heads of a list and grades in one launch."""
    if _widest(maps) > WIDEST:
        return reference.encode_graded(x, maps, lists, planes, most)
    x, shape = _rows_in_place(x), (x.shape[0], lists, x.shape[2])
    words = maps.bits // reference.WORD
    out = torch.empty(*shape, words, 1 + planes, dtype=torch.int32, device=x.device)
    steps = torch.empty(shape, device=x.device)
    launch.encode(x, maps, out, grading=launch.Grading(planes, most, steps))
    return out, steps


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
    """Histograms of digits, then compaction: two launches for up to 32 levels, three for 1,024.

    More levels than `configs.MOST_LEVELS` are compared in torch.
    """
    batch, heads, q_len, words = query_codes.shape[:4]
    grades = query_codes.shape[4] - 1 if query_codes.dim() == 5 else 0
    if levels(heads // lists, words, grades, most) > configs.MOST_LEVELS:
        given = (query_codes, key_codes, heavy, spans, sink, local, lists, width)
        return reference.select_by_codes(*given)
    keys = key_codes if isinstance(key_codes, Tiled) else Tiled.from_tokens(tokens_of(key_codes))
    shape = (batch, lists, q_len, width)
    indices = torch.empty(shape, dtype=torch.int32, device=query_codes.device)
    rows, group = batch * lists * q_len, heads // lists
    if rows:
        space = launch.SelectSpace.reserve(
            rows, max(1, keys.length), group, words, query_codes.device, grades, most
        )
        codes, heavy, spans = query_codes.contiguous(), heavy.contiguous(), spans.contiguous()
        launch.select(codes, keys, heavy, spans, sink, local, indices, space)
    return indices


sample = reference.sample  # by scores, of which no kernel of its own makes anything


def sample_by_codes(
    query_codes: Tensor,
    key_codes: Tensor | Codes,
    units: Tensor,
    certain: Tensor,
    drawn: Tensor,
    trust: int,
    coins: Coins,
    spans: Tensor,
    sink: int,
    local: int,
    width: int,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The histograms of selection, then three launches; in torch for 1,024 levels and more."""
    batch, heads, q_len, words = query_codes.shape[:4]
    lists, device = units.shape[1], query_codes.device
    group, grades = heads // lists, query_codes.shape[4] - 1 if query_codes.dim() == 5 else 0
    if levels(group, words, grades, most) >= configs.MOST_SURVEYED:
        return reference.sample_by_codes(
            query_codes, key_codes, units, certain, drawn, trust, coins, spans, sink, local, width
        )
    if not grades and group % 2 == 0:
        units = 2 * units  # distances of an even group are halved, see scoring
    keys = key_codes if isinstance(key_codes, Tiled) else Tiled.from_tokens(tokens_of(key_codes))
    indices = torch.empty(batch, lists, q_len, width, dtype=torch.int32, device=device)
    weights = torch.empty(batch, lists, q_len, width, device=device)
    rows = batch * lists * q_len
    if rows:
        space = launch.SelectSpace.reserve(
            rows, max(1, keys.length), group, words, device, grades, most
        )
        numbers = (part.contiguous() for part in (units, certain, drawn))
        launch.sample(query_codes.contiguous(), keys, *numbers, trust, coins, spans.contiguous(),
                      sink, local, indices, weights, space)  # fmt: skip
    return indices, weights


def union(indices: Tensor, lists: int, n: int) -> Tensor:
    """As wide as a union can be: its true width would have to be read from the device."""
    batch, before, q_len, width = indices.shape
    most = min(n, width * before // lists)
    words = -(-max(n, 1) // 32)
    bitmap = torch.zeros(batch, lists, q_len, words, dtype=torch.int32, device=indices.device)
    out = torch.empty(batch, lists, q_len, most, dtype=torch.int32, device=indices.device)
    if out.numel():
        launch.union(indices.contiguous(), bitmap, out)
    return out


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
    """Gather and attend in one pass over parts of the lists, then merge the parts."""
    indices = indices.contiguous()
    if log_weights is not None:
        log_weights = log_weights.float().contiguous()
    return _attend(q, k, v, indices, None, indices.shape[1], indices.shape[3],
                   scaling, softcap, sinks, log_weights)  # fmt: skip


def attend_rows(
    q: Tensor,
    rows: Tensor,
    row_format: RowFormat,
    indices: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same pass over rows, which it decodes. Products are in the format's dtype."""
    indices = indices.contiguous()
    if log_weights is not None:
        log_weights = log_weights.float().contiguous()
    words = _rows_in_place(rows)
    if any(step % WORD_BYTES for step in words.stride()[:3]) or words.data_ptr() % WORD_BYTES:
        words = words.contiguous()
    words = words.view(torch.int32)
    middle = row_format.key_dim * row_format.bits // 32
    q = q.to(row_format.dtype if row_format.dtype in DTYPES else torch.float32).contiguous()
    out = torch.empty(*q.shape[:3], row_format.value_dim, device=q.device)
    lse = torch.empty(q.shape[:3], device=q.device)
    if lse.numel():
        space = launch.AttendSpace.reserve(
            q, indices.shape[1], indices.shape[3], row_format.value_dim, q.dtype, row_format.bits
        )
        launch.attend(q, words, words[..., middle:], indices, None, scaling, softcap, sinks, out,
                      lse, space, log_weights, bits=row_format.bits)  # fmt: skip
    return out, lse


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, query_maps: Maps, key_maps: Maps, *,
    heavy: Tensor, spans: Tensor, sink: int, local: int, width: int, lists: int, scaling: float,
    grades: Grades | None, drawing: Drawing | None, softcap: float | None, sinks: Tensor | None,
    length: Tensor | None = None, counters: Tensor | None = None, memory: dict | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """Four launches, or six that draw: encoding, selection or sampling, attention. Their memory is
    kept between calls. None where kernels cannot: the parts can.

    length () or (batch,) int64: how many tokens there are, where `codes` does not know it but has
    the room. memory: where what the launches share stays, for graphs (see step.kept_space).
    """
    planes, most = grades or (0, None)
    group = 1 if grades else q.shape[1] // lists
    highest = levels(group, query_maps.bits // reference.WORD, planes, most)
    most_held = configs.MOST_LEVELS if drawing is None else configs.MOST_SURVEYED - 1
    fits = max(map(_widest, (query_maps, key_maps))) <= WIDEST and isinstance(codes, Tiled)
    if not fits or highest > most_held or 0 in (q.shape[0], width):
        return None
    batch, device = q.shape[0], q.device
    if length is None:
        codes.extend(batch, key_maps.heads, query_maps.bits // reference.WORD, device)
    place = codes.length - 1 if length is None else length.expand(batch)
    q, k, v = map(_rows_in_place, (q, k, v))
    indices = torch.empty(batch, lists, 1, width, dtype=torch.int32, device=device)
    log_weights = None if drawing is None else torch.empty(indices.shape, device=device)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    draws, spans = drawing is not None, spans.contiguous()
    space = step.kept_space(
        q, v, codes.storage, query_maps.bits, lists, width, grades, draws, memory
    )
    step.encode(space, q, k, v, codes, query_maps, key_maps, place, heavy=heavy, spans=spans,
                drawing=drawing, counters=counters)  # fmt: skip
    step.choose(space, codes, indices, log_weights, spans=spans, sink=sink, local=local,
                drawing=drawing)  # fmt: skip
    launch.attend(q, k, v, indices, None, scaling, softcap, sinks, out, space.lse,
                  space.attention, log_weights, counters)  # fmt: skip
    return out, indices, log_weights


reserve_step = step.reserve


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The same pass over all tokens of the spans."""
    n = k.shape[2]
    if spans is None:
        spans = torch.zeros(q.shape[0], q.shape[2], 2, dtype=torch.int64, device=q.device)
        spans[..., 1] = n
    return _attend(q, k, v, None, spans.contiguous(), k.shape[1], n, scaling, softcap, sinks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    spans: Tensor | None,
    lists: int,
    width: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows_in_place(q), _rows_in_place(k), _rows_in_place(v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3], device=q.device)
    if lse.numel():
        space = launch.AttendSpace.reserve(q, lists, width, v.shape[3], k.dtype)
        launch.attend(q, k, v, indices, spans, scaling, softcap, sinks, out, lse, space,
                      log_weights)  # fmt: skip
    return out, lse


def _codes_like(x: Tensor, maps: Maps) -> Tensor:
    batch, _, rows, _ = x.shape
    shape = (batch, maps.heads, rows, maps.bits // reference.WORD)
    return torch.empty(shape, dtype=torch.int32, device=x.device)


def _widest(maps: Maps) -> int:
    """Outputs of the widest stage."""
    return max(weight.shape[2] for weight in maps.weights)


def _rows_in_place(tensor: Tensor) -> Tensor:
    """`tensor` (4 axes) if its last axis is dense in memory, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()

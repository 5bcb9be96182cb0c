"""The kernels of this backend as `api` calls them (shapes there): tensors in, addresses to numba.

Few calls of torch: after a layer's weights have passed through the caches, the first use of each
torch function costs tens of microseconds.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import numpy_cpu, reference
from ..codes import ByteMajor, Codes, tokens_of
from ..coins import CHANCES, Coins, parts_of
from ..maps import ACTIVATIONS, Maps
from ..quantised import NOT_NUMBERS, RowFormat, signs_of
from . import (
    attention,
    encoding,
    lookup,
    passes,
    quantising,
    ranking,
    sampling,
    selection,
    step,
    verified,
)
from .regions import Region, real
from .selection import WORD
from .simd import HARDWARE_HALVES
from .static import STORAGE

if TYPE_CHECKING:
    from ..rule import Rule
    from ..step import Drawing, Grades

FEW = 8  # vectors of a map, up to which reading its weights takes most of the time
WORTH_A_THREAD = 2**20  # bytes of weights that pay for another thread
DIMS = 16  # head dims of K and V must be multiples of it
_UNDRAWN, _UNVERIFIED = (0,) * 9, (0,) * 5  # fields of step.CALL
_SCRATCH = threading.local()
_LIMITS = {
    dtype: torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype).numpy()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}
_PACKED: WeakKeyDictionary[Maps, Packed] = WeakKeyDictionary()
_STEPS: WeakKeyDictionary[Maps, WeakKeyDictionary[Maps, dict]] = WeakKeyDictionary()


def supports(kernel: str, *arguments) -> bool:
    """Whether this backend runs `kernel` on these arguments (vectors to encode, or q, k and v)."""
    if kernel == "grade_bits":
        return arguments[0].dtype == torch.float32
    if kernel == "encode":
        return all(x.dtype in STORAGE and x.shape[3] % 8 == 0 for x in arguments)
    if kernel == "quantise":
        return arguments[0].dtype in STORAGE
    if kernel in ("attend", "dense_decode", "decode_step"):
        q, k, v = arguments
        dims = k.shape[3] % DIMS == 0 and v.shape[3] % DIMS == 0
        return dims and q.dtype in STORAGE and k.dtype in STORAGE and k.dtype == v.dtype
    return True


@dataclass(frozen=True)
class Packed:
    """A stack of maps as the kernel reads it: weights and biases of all maps, widths of the stages.

    fields: of encoding.CALL, from stages to map_biases. addresses: of weights and biases. shape:
    equal for two stacks that one call can encode.
    """

    weights: np.ndarray
    biases: np.ndarray
    widths: np.ndarray
    fields: tuple[int, ...]
    addresses: tuple[int, int]
    shape: tuple
    half: bool
    widest: int
    map_bytes: int


def encode(x: Tensor, maps: Maps) -> Tensor:
    """A few vectors with the fused kernel, many with torch's matrix products."""
    if x.shape[0] * x.shape[2] > FEW:
        return _encode_many(x, maps)
    x = _rows_in_place(x)
    out, stack = _stack(x, maps)
    _encode(x, maps, stack, (0,) * len(stack))
    return out


def encode_pair(
    queries: Tensor, query_maps: Maps, keys: Tensor, key_maps: Maps
) -> tuple[Tensor, Tensor]:
    """Both stacks in one region, if their shapes are equal and the vectors few."""
    fusable = pack_maps(query_maps).shape == pack_maps(key_maps).shape
    fusable = fusable and queries.dtype == keys.dtype and queries.shape[0] == keys.shape[0]
    if not fusable or queries.shape[0] * max(queries.shape[2], keys.shape[2]) > FEW:
        return encode(queries, query_maps), encode(keys, key_maps)
    queries, keys = _rows_in_place(queries), _rows_in_place(keys)
    out, stack = _stack(queries, query_maps)
    key_out, key_stack = _stack(keys, key_maps)
    _encode(queries, query_maps, stack, key_stack)
    return out, key_out


def _stack(x: Tensor, maps: Maps) -> tuple[Tensor, tuple[int, ...]]:
    """Memory for the codes of a stack of maps, and the stack's fields of encoding.CALL."""
    batch, heads, rows, _ = x.shape
    packed = pack_maps(maps)
    out = torch.empty((batch, maps.heads, rows, maps.bits // WORD), dtype=torch.int32)
    return out, (
        maps.heads, heads, rows, x.data_ptr(), _span(x), *x.stride()[:3], *packed.addresses,
        out.data_ptr(),
    )  # fmt: skip


def _encode(x: Tensor, maps: Maps, stack: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Run the kernel on one or two stacks of equal shape; the fields of a missing one are 0."""
    packed, batch = pack_maps(maps), x.shape[0]
    units = batch * (stack[0] + second[0])
    most = max(1, units * packed.map_bytes // WORTH_A_THREAD)
    memory = _memory(8 * packed.widest, most)
    region = encoding.encode_region(x.dtype, packed.half)
    region.run(units, *packed.fields, batch, *memory, *stack, *second, most=most)


def _encode_many(x: Tensor, maps: Maps) -> Tensor:
    x = x.repeat_interleave(maps.heads // x.shape[1], 1)
    signs = reference.preactivations(x, maps).contiguous()
    words = maps.bits // WORD
    out = torch.empty(*signs.shape[:3], words, dtype=torch.int32)
    rows = out.shape[:3].numel()
    encoding.pack_region().run(rows, words, signs.data_ptr(), out.data_ptr())
    return out


def pack_maps(maps: Maps) -> Packed:
    """The maps' weights in strips of 32 outputs, the last one padded; packed once for all calls."""
    packed = _PACKED.get(maps)
    if packed is None:
        packed = _PACKED[maps] = _pack(maps)
    return packed


def _pack(maps: Maps) -> Packed:
    strip = encoding.STRIP
    stages, biases, widths = [], [], [maps.weights[0].shape[1]]
    for weight, bias in zip(maps.weights, maps.biases, strict=True):
        grow = (0, -weight.shape[2] % strip)
        padded = F.pad(weight.detach().float(), grow)
        strips = padded.unflatten(2, (-1, strip)).transpose(1, 2)
        stages.append(strips.reshape(maps.heads, -1))
        biases.append(F.pad(bias.detach().float(), grow))
        widths.append(weight.shape[2])
    if maps.folds:
        biases.append(maps.steps.detach().float().flatten(1))
    flat = torch.cat(stages, dim=1).reshape(-1)
    half = flat.bfloat16()
    if bool((half.float() == flat).all()):  # half the bytes hold the same numbers
        flat = half.view(torch.uint16)
    weights, biases = flat.numpy(), torch.cat(biases, dim=1).reshape(-1).numpy()
    activation = ACTIVATIONS.index(maps.activation)
    shape = (*widths, activation, maps.folds, weights.dtype)
    widths = np.array(widths, dtype=np.int64)
    per_map = len(weights) // maps.heads
    return Packed(
        weights,
        biases,
        widths,
        (
            len(stages),
            widths.ctypes.data,
            activation,
            maps.folds,
            per_map,
            len(biases) // maps.heads,
        ),
        (weights.ctypes.data, biases.ctypes.data),
        shape,
        weights.dtype == np.uint16,
        -(-int(widths.max()) // strip) * strip,
        per_map * weights.itemsize,
    )


def encode_graded(
    x: Tensor, maps: Maps, lists: int, planes: int, most: int
) -> tuple[Tensor, Tensor]:
    """A few vectors with the fused kernel; many by matrix products of torch, then graded in one
    pass."""
    batch, heads, rows, _ = x.shape
    bits = maps.bits
    if batch * rows > FEW:
        sums = reference.preactivations(x, maps).unflatten(1, (lists, -1)).sum(dim=2)
        return grade_bits(sums, planes, most), reference.grade_step(sums, planes, most)
    x, packed = _rows_in_place(x), pack_maps(maps)
    out = torch.empty((batch, lists, rows, bits // WORD, 1 + planes), dtype=torch.int32)
    steps = torch.empty((batch, lists, rows))
    units = batch * lists * rows
    threads = max(1, heads * packed.map_bytes // WORTH_A_THREAD)
    encoding.grade_region(x.dtype, packed.half).run(
        units,
        *packed.fields, batch, lists, heads // lists, rows, planes, most, packed.widest,
        x.data_ptr(), _span(x), *x.stride()[:3], *packed.addresses,
        out.data_ptr(), steps.data_ptr(),
        *_memory(encoding.grading_bytes(packed.widest, bits), threads),
        most=threads,
    )  # fmt: skip
    return out, steps


def grade_bits(preactivations: Tensor, planes: int, most: int) -> Tensor:
    """Signs and weights' digits in one pass."""
    *shape, bits = preactivations.shape
    values = preactivations.detach().reshape(-1, bits).contiguous()
    words = bits // WORD
    out = np.empty(len(values) * words * (1 + planes), dtype=np.uint32)
    room = np.empty(bits), np.empty(words, dtype=np.uint32), np.empty(bits, dtype=np.uint16)
    selection.grade_rows(values.numpy(), planes, most, *room, out)
    return torch.from_numpy(out.view(np.int32)).reshape(*shape, words, 1 + planes)


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
    """One row at a time, in the caches: distances, threshold and compaction."""
    batch, heads, rows, words = query_codes.shape[:4]
    lines, code_heads, n = _lines(key_codes), key_codes.shape[1], key_codes.shape[2]
    queries, heavy, spans = query_codes.contiguous(), heavy.contiguous(), spans.contiguous()
    group = heads // lists
    grades, most = _levels(query_codes, group, most)
    if most is None:
        return numpy_cpu.select_by_codes(
            query_codes, key_codes, heavy, spans, sink, local, lists, width
        )
    out = torch.empty((batch, lists, rows, width), dtype=torch.int32)
    wide = most > np.iinfo(np.uint8).max
    tables = selection.BYTES * words * lookup.TABLES
    size = selection.query_bytes(words) + tables + n * (2 if wide else 1)
    selection.select_region(wide).run(
        batch * lists * rows,
        batch, lists, rows, group, grades, most, lists // code_heads, words, width, sink, local, n,
        lines.data_ptr(), _span(lines), *lines.stride()[:3],
        queries.data_ptr(), heavy.data_ptr(), spans.data_ptr(), out.data_ptr(),
        *_memory(size, torch.get_num_threads()),
    )  # fmt: skip
    return out


def _levels(query_codes: Tensor, group: int, most: int | None) -> tuple[int, int | None]:
    """Planes of graded queries, 0 for plain ones, and `_most`."""
    grades = query_codes.shape[4] - 1 if query_codes.dim() == 5 else 0
    return grades, _most(grades, group, query_codes.shape[3], most)


def _most(grades: int, group: int, words: int, most: int | None) -> int | None:
    """The largest distance; None instead of one that the tables cannot hold."""
    weight = 2**grades - 1 if grades else group // (2 if group % 2 == 0 else 1)
    highest = words * WORD * weight
    most = highest if most is None or not grades else min(most, highest)
    fits = most <= np.iinfo(np.uint16).max and min(4 * weight, most) <= lookup.MOST
    return most if fits else None


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
    """Selection, a survey of distances for the threshold, and a pass that flips the coins."""
    batch, heads, rows, words = query_codes.shape[:4]
    lists, code_heads, n = units.shape[1], key_codes.shape[1], key_codes.shape[2]
    group = heads // lists
    grades, most = _levels(query_codes, group, most)
    if most is None:
        return reference.sample_by_codes(
            query_codes, key_codes, units, certain, drawn, trust, coins, spans, sink, local, width
        )
    if not grades and group % 2 == 0:
        units = 2 * units  # distances of an even group are halved, see selection.weigh_bits
    lines, queries, spans = _lines(key_codes), query_codes.contiguous(), spans.contiguous()
    numbers = [part.contiguous() for part in (units, certain, drawn)]
    out = torch.empty((batch, lists, rows, width), dtype=torch.int32)
    weights = torch.empty((batch, lists, rows, width))
    wide = most > np.iinfo(np.uint8).max
    tables = selection.BYTES * words * lookup.TABLES
    size = selection.query_bytes(words) + tables
    size += sampling.drawing_bytes(n, most, 2 if wide else 1)
    sampling.sample_region(wide).run(
        batch * lists * rows,
        batch, lists, rows, group, grades, most, lists // code_heads, words, width, sink, local, n,
        lines.data_ptr(), _span(lines), *lines.stride()[:3],
        queries.data_ptr(), spans.data_ptr(), out.data_ptr(),
        *_memory(size, torch.get_num_threads()),
        *(part.data_ptr() for part in numbers), trust, coins.state, coins.first_list,
        int(coins.fresh), weights.data_ptr(), *sampling.TABLES_AT,
    )  # fmt: skip
    return out, weights


def sample(
    costs: Tensor, certain: Tensor, drawn: Tensor, trust: int, coins: Tensor, candidates: Tensor,
    mandatory: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference's, with a compiled search for the threshold."""
    return reference.sample(
        costs, certain, drawn, trust, coins, candidates, mandatory, threshold=_threshold
    )


def _threshold(costs: Tensor, counts: Tensor, drawn: Tensor, caps: Tensor) -> Tensor:
    rows = drawn.numel()
    tables = [part.reshape(rows, -1).contiguous().numpy() for part in (costs, counts)]
    numbers = [part.reshape(rows).contiguous().numpy() for part in (drawn, caps)]
    out, room = np.empty(rows, dtype=np.int64), np.empty((2, costs.shape[-1]), dtype=np.int64)
    sampling.find_thresholds(*tables, *numbers, CHANCES, *room, out)
    return torch.from_numpy(out).reshape(drawn.shape)


def select(scores: Tensor, k: Tensor, candidates: Tensor, mandatory: Tensor) -> Tensor:
    """Floats by the order of their bits, integers of a narrow range as distances are selected;
    others by numpy."""
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if scores.dtype not in (*_LIMITS, torch.float32) or scores.numel() == 0:
        return numpy_cpu.select(scores, k, candidates, mandatory)
    batch, lists, rows, n = scores.shape
    scores, k = scores.contiguous(), k.contiguous().numpy().reshape(-1)
    numbers, addresses = [lists, rows, n], []
    masks = [_rows_in_place(mask) for mask in (candidates, mandatory)]  # copies outlive the calls
    for mask in masks:
        numbers += [*mask.expand(scores.shape).stride()[:3], _span(mask)]
        addresses.append(mask.data_ptr())
    choose = _best_floats if scores.dtype == torch.float32 else _best_integers
    out = choose(scores, tuple(numbers), addresses, k)
    if out is None:
        return numpy_cpu.select(scores, torch.from_numpy(k).reshape(batch, lists, rows), *masks)
    return torch.from_numpy(out).reshape(batch, lists, rows, out.shape[1])


def _best_floats(
    scores: Tensor, numbers: tuple[int, ...], masks: list[int], k: np.ndarray
) -> np.ndarray:
    arguments = numbers, scores.data_ptr(), *masks
    survey, orders = np.empty((len(k), 2), np.int64), np.empty(scores.shape[3], np.uint32)
    ranking.survey_scores(*arguments, orders, survey)
    width = int((survey[:, 0] + np.minimum(k, survey[:, 1])).max())
    out = np.empty((len(k), width), dtype=np.int32)
    ranking.choose_best(*arguments, k, orders, np.empty(ranking.DIGITS, np.int32), out)
    return out


def _best_integers(
    scores: Tensor, numbers: tuple[int, ...], masks: list[int], k: np.ndarray
) -> np.ndarray | None:
    """None if the scores range over more than 16 bits."""
    arguments = numbers, scores.data_ptr(), _LIMITS[scores.dtype], *masks
    survey = np.empty((len(k), 4), dtype=np.int64)
    selection.survey_units(*arguments, survey)
    free = survey[:, 1] > 0
    span = int((survey[free, 3] - survey[free, 2]).max()) + 2 if free.any() else 1
    if span > np.iinfo(np.uint16).max:
        return None
    width = int((survey[:, 0] + np.minimum(k, survey[:, 1])).max())
    out = np.empty((len(k), width), dtype=np.int32)
    kind = np.uint8 if span <= np.iinfo(np.uint8).max else np.uint16
    selection.choose_units(*arguments, k, survey, out, np.empty(scores.shape[3], dtype=kind))
    return out


def smallest(levels: Tensor, k: int) -> Tensor:
    """Positions (lists, k) int32 of the k smallest levels (lists, n) uint8, ascending, ties to the
    lowest: the threshold and compaction of `select_by_codes` alone, for timing."""
    lists, values = levels.shape[0], levels.contiguous().numpy()
    out = np.empty((lists, k), dtype=np.int32)
    selection.smallest_units(values, k, out)
    return torch.from_numpy(out)


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
    """Gather and attend in one pass over the lists. IndexError for a token outside the cache."""
    if log_weights is not None:
        log_weights = log_weights.float().contiguous()
    return _run(q, k, v, indices.shape[1], indices.contiguous(), None, scaling, softcap, sinks,
                log_weights)  # fmt: skip


def quantise(keys: Tensor, values: Tensor, row_format: RowFormat) -> Tensor:
    """Each row by itself, on all threads."""
    keys, values = _rows_in_place(keys), _rows_in_place(values)
    batch, heads, tokens, dim = keys.shape
    value_dim, width = row_format.value_dim, row_format.width
    rows = torch.empty((batch, heads, tokens, width), dtype=torch.uint8)
    signs = [_signs(dim) for dim in (dim, value_dim)]
    flaws = quantising.quantise_region(dim, value_dim, keys.dtype).run(
        batch * heads * tokens,
        heads, tokens, row_format.bits,
        keys.data_ptr(), _span(keys), *keys.stride()[:3], signs[0].ctypes.data,
        values.data_ptr(), _span(values), *values.stride()[:3], signs[1].ctypes.data,
        rows.data_ptr(), width, *quantising.TABLES_AT,
        *_memory(quantising.memory_of(max(dim, value_dim)), torch.get_num_threads()),
    )  # fmt: skip
    if flaws:
        raise ValueError(NOT_NUMBERS)
    return rows


@cache
def _signs(dim: int) -> np.ndarray:
    return signs_of(dim).numpy()


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
    """`attend` over rows whose codes are decoded in registers."""
    if log_weights is not None:
        log_weights = log_weights.float().contiguous()
    rows = _rows_in_place(rows)
    codes = rows.view(torch.int8) if row_format.bits == 8 else rows
    middle = row_format.key_dim * row_format.bits // 8
    keys, values = codes[..., :middle], codes[..., middle : row_format.codes]
    return _run(q, keys, values, indices.shape[1], indices.contiguous(), None, scaling, softcap,
                sinks, log_weights, row_format.value_dim)  # fmt: skip


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
    """One pass over K and V at the speed of the memory."""
    if spans is None:
        spans = torch.tensor([0, k.shape[2]]).expand(q.shape[0], q.shape[2], 2)
    return _run(q, k, v, k.shape[1], None, spans.contiguous(), scaling, softcap, sinks)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, query_maps: Maps, key_maps: Maps, *,
    width: int, lists: int, drawing: Drawing | None, **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """One region for the whole step. None where it cannot: the parts can."""
    log_weights, draws = _drawing_of(drawing, q.shape[0], lists, width)
    made = _run_step(q, k, v, codes, query_maps, key_maps, lists, width, draws=draws, **arguments)
    return None if made is None else (*made, log_weights)


def _drawing_of(
    drawing: Drawing | None, batch: int, lists: int, width: int
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Room for log weights, and the fields of step.CALL about drawing."""
    if drawing is None:
        return None, _UNDRAWN
    drawn, coins = drawing.drawn, drawing.coins
    log_weights = torch.empty((batch, lists, 1, width))
    steps = _steps(drawn) if drawn.dim() == 3 else (0, 1)
    return log_weights, (
        log_weights.data_ptr(), drawing.slopes.data_ptr(), drawn.data_ptr(), *steps,
        parts_of(drawing.trust), coins.state, coins.first_list, int(coins.fresh),
    )  # fmt: skip


def verified_step(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, query_maps: Maps, key_maps: Maps, *,
    rule: Rule, lists: int, drawing: Drawing | None, **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:  # fmt: skip
    """The same region, in which each list reads until the rule is content."""
    levels = torch.empty((q.shape[0], lists, 1), dtype=torch.int64)
    lengths = torch.empty_like(levels)
    verifies = (
        rule.coefficients.data_ptr(), rule.coefficients.shape[1], rule.start.data_ptr(),
        levels.data_ptr(), lengths.data_ptr(),
    )  # fmt: skip
    room = codes.length + 1
    log_weights, draws = _drawing_of(drawing, q.shape[0], lists, room)
    made = _run_step(
        q, k, v, codes, query_maps, key_maps, lists, room, draws=draws, verifies=verifies,
        limit=rule.limit, **arguments,
    )  # fmt: skip
    if made is None:
        return None
    out, indices = made
    width = int(lengths.max())
    beyond = torch.arange(width) >= lengths[..., None]
    if log_weights is not None:
        log_weights = log_weights[..., :width].masked_fill(beyond, 0)
    return out, indices[..., :width].masked_fill(beyond, -1), log_weights, levels


def _run_step(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, query_maps: Maps, key_maps: Maps, lists: int,
    width: int, *, heavy: Tensor, spans: Tensor, sink: int, local: int, scaling: float,
    grades: Grades | None, softcap: float | None, sinks: Tensor | None,
    draws: tuple[int, ...] = _UNDRAWN, verifies: tuple[int, ...] = _UNVERIFIED, limit: float = 0.0,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Output and room for indices (B, lists, 1, width), as the fields of step.CALL ask for."""
    batch, heads, _, dim = q.shape
    tokens, threads = codes.length + 1, torch.get_num_threads()
    room = batch <= FEW and batch * lists >= threads and isinstance(codes, ByteMajor)
    if not room or sinks is not None:
        return None
    grows = verifies is not _UNVERIFIED
    kind = (batch, heads, dim, v.shape[3], k.shape[1], lists, q.dtype, k.dtype, grades, grows)
    made = _STEPS.setdefault(query_maps, WeakKeyDictionary()).setdefault(key_maps, {})
    if kind not in made:
        made[kind] = _prepare(query_maps, key_maps, *kind)
    layer = made[kind]
    if layer is None:
        return None
    key, q_strides, k_strides, v_strides = k.data_ptr(), q.stride(), k.stride(), v.stride()
    if q_strides[3] + k_strides[3] + v_strides[3] != 3:
        return None
    value, offset = v.data_ptr(), 0
    gap = (value - key) // layer.itemsize
    if 0 < gap < k_strides[2]:  # as in _run
        value, offset = key, gap
    lines = codes.extend(batch, layer.words)
    indices = torch.empty((batch, lists, 1, width), dtype=torch.int32)
    out = torch.empty((batch, heads, 1, v.shape[3]), dtype=q.dtype)
    drawing = sampling.drawing_bytes(tokens, layer.most, 2)
    drawing = -(-drawing // 64) * 64
    size = layer.size + drawing
    if grows:
        size += verified.verifying_bytes(tokens, heads // lists, v.shape[3])
    flaws = layer.region.run(
        batch * lists,
        *layer.fields,
        *_memory(size, threads), drawing, width, tokens, sink, local, q.data_ptr(), *q_strides[:2],
        key, *k_strides[:3], value, offset, *v_strides[:3],
        lines.data_ptr(), *lines.stride()[:3], heavy.data_ptr(), *_steps(heavy), spans.data_ptr(),
        indices.data_ptr(), out.data_ptr(), *draws, *verifies,
        real(scaling), real(softcap or 0.0), real(limit),
    )  # fmt: skip
    if flaws:
        codes.crop(tokens - 1)
        raise FloatingPointError(reference.NON_FINITE)
    return out, indices


def _steps(counts: Tensor) -> tuple[int, int]:
    """Strides of a batch item and of a list in counts (B, 1 or lists, 1), which a 1 repeats."""
    shape, strides = counts.shape, counts.stride()
    return strides[0] if shape[0] > 1 else 0, strides[1] if shape[1] > 1 else 0


@dataclass(frozen=True)
class _LayerStep:
    """What the steps of a layer have in common: the region and the first fields of its calls.

    size: bytes of a thread's memory, without those that grow with the tokens.
    """

    region: Region
    fields: tuple[int, ...]
    size: int
    most: int
    words: int
    itemsize: int


def _prepare(
    query_maps: Maps, key_maps: Maps, batch: int, heads: int, dim: int, value_dim: int,
    kv_heads: int, lists: int, q_dtype: torch.dtype, k_dtype: torch.dtype, grades: Grades | None,
    grows: bool,
) -> _LayerStep | None:  # fmt: skip
    """None where heads do not fit, distances not into tables, or the maps' weights differ in
    type."""
    query, key, fewest = pack_maps(query_maps), pack_maps(key_maps), max(kv_heads, key_maps.heads)
    if query_maps.heads != heads or heads % lists or lists % fewest or key_maps.heads % kv_heads:
        return None
    group, words = heads // lists, query_maps.bits // WORD
    planes, limit = (0, None) if grades is None else grades
    if grades is not None and not (1 <= planes <= 8 and WORD * words <= limit):
        return None
    most = _most(planes, group, words, limit)
    halves = q_dtype != torch.float16 or HARDWARE_HALVES
    if most is None or query.half != key.half or dim % 8 or not halves:
        return None
    together = 4 if group > 1 else 1
    wide = most > np.iinfo(np.uint8).max
    region, block = step.step_region(
        dim, value_dim, together, k_dtype, q_dtype, query.half, wide, grows
    )
    widest, padded = max(query.widest, key.widest), -(-group // together) * together
    floats = -(-(together * block + padded * (dim + value_dim + 16)) // 16) * 16
    grading = encoding.grading_bytes(widest, WORD * words)
    size = 8 * passes.SCRATCH + grading + 64 * -(-4 * group * words // 64) + 4 * floats
    size += selection.BYTES * words * lookup.TABLES + 64 * -(-4 * batch * heads // 64)
    fields = (
        batch, lists, 1, group, lists // kv_heads, lists // key_maps.heads, key_maps.heads, widest,
        *query.fields, *query.addresses, *key.fields, *key.addresses,
        planes, most, words, *sampling.TABLES_AT, grading, floats,
    )  # fmt: skip
    return _LayerStep(region, fields, size, most, words, k_dtype.itemsize)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: int,
    indices: Tensor | None,
    spans: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    log_weights: Tensor | None = None,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to listed tokens, or to spans where there are no lists. value_dim: where it is not
    the width of v."""
    out_dtype = q.dtype
    if sinks is not None or (out_dtype == torch.float16 and not HARDWARE_HALVES):
        q = q.float()  # the output is rounded once, at the end
    q, k, v = _rows_in_place(q), _rows_in_place(k), _rows_in_place(v)
    batch, heads, rows, dim = q.shape
    kv_heads, tokens, value_dim = k.shape[1], k.shape[2], value_dim or v.shape[3]
    group, units, threads = heads // lists, batch * lists * rows, torch.get_num_threads()
    parts = 1 if units >= threads else -(-threads // units)
    together = 4 if group > 1 else 1
    region, block = attention.attend_region(
        dim, value_dim, together, int(indices is None), k.dtype, q.dtype
    )
    # 1 / total of a row whose listed logits are all -inf: NaN as in torch, where this call's one
    # part is the whole softmax; else merging or the sinks decide below
    unweighted = math.nan if parts == 1 and sinks is None else 0.0
    out = torch.empty((parts, batch, heads, rows, value_dim), dtype=q.dtype)
    lse = torch.empty((parts, batch, heads, rows))
    key, value, offset = k.data_ptr(), v.data_ptr(), 0
    gap = (value - key) // k.element_size()
    if 0 < gap < k.stride(2):  # the K and V rows of a token lie side by side: one array holds both
        value, offset = key, gap
    padded = -(-group // together) * together
    floats = together * block + padded * (dim + value_dim + 16)  # attention.workspace
    outside = region.run(
        units * parts,
        parts, batch, lists, rows, group, lists // kv_heads,
        0 if indices is None else indices.shape[3], tokens,
        q.data_ptr(), _span(q), *q.stride()[:3],
        key, _span(k) + offset, *k.stride()[:3],
        value, _span(v) + offset, offset, *v.stride()[:3],
        0 if indices is None else indices.data_ptr(),
        0 if log_weights is None else log_weights.data_ptr(),
        0 if spans is None else spans.data_ptr(),
        out.data_ptr(), lse.data_ptr(), *_memory(8 * passes.SCRATCH + 4 * floats, threads),
        real(scaling), real(softcap or 0.0), real(unweighted),
    )  # fmt: skip
    if outside:
        raise IndexError(f"indices name tokens outside the {tokens} in the cache")
    if parts == 1:
        out, lse = out[0], lse[0]
    else:
        out, lse = reference.merge(out, lse)
        if sinks is None and bool((lse == -torch.inf).any()):
            listed = _has_tokens(indices, spans, group)
            out = out.masked_fill(((lse == -torch.inf) & listed)[..., None], torch.nan)
    out, lse = reference.add_sinks(out, lse, sinks)
    return out.to(out_dtype), lse


def _has_tokens(indices: Tensor | None, spans: Tensor | None, group: int) -> Tensor:
    """Which rows list any token, (batch, heads or 1, rows) bool."""
    if indices is None:
        return (spans[..., 0] < spans[..., 1])[:, None]
    return (indices >= 0).any(dim=-1).repeat_interleave(group, 1)


def _memory(size: int, threads: int) -> tuple[int, int]:
    """Scratch memory: its address, bytes for each thread. Kept between calls of a Python thread."""
    size = -(-size // 64) * 64
    if getattr(_SCRATCH, "size", 0) < size * threads:
        _SCRATCH.size = size * threads
        _SCRATCH.memory = np.empty(size * threads, dtype=np.uint8)
        _SCRATCH.address = _SCRATCH.memory.ctypes.data
    return _SCRATCH.address, size


def _lines(codes: Tensor | Codes) -> Tensor:
    """Bytes (batch, heads, 4 * words, n) of codes, those of a place side by side."""
    if isinstance(codes, ByteMajor):
        return codes.storage
    return ByteMajor.from_tokens(tokens_of(codes)).storage


def _rows_in_place(tensor: Tensor) -> Tensor:
    """`tensor` (4 axes) if its last axis is dense in memory, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _span(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor (4 axes), gaps included."""
    (a, b, c, d), (w, x, y, z) = tensor.shape, tensor.stride()
    return 1 + (a - 1) * w + (b - 1) * x + (c - 1) * y + (d - 1) * z

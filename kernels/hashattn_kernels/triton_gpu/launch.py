"""Launches: from tensors to the arguments of the kernels. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..codes import TILE, Tiled
from ..coins import Coins
from ..coins import table as coin_table
from ..maps import Maps
from . import configs
from .attention import attend_kernel
from .encoding import encode_kernel
from .sampling import list_kernel, survey_kernel, tally_kernel
from .selection import compact_kernel, histogram_kernel, refine_kernel
from .unions import mark_kernel, write_kernel

_PACKED: WeakKeyDictionary[Maps, WeakKeyDictionary[Maps, Packed]] = WeakKeyDictionary()


def on(tensor: Tensor):
    """Context of the device that launches go to."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@dataclass(frozen=True)
class Packed:
    """Weights and biases (maps, numbers) of two stacks of maps of equal widths, or of one stack, as
    encode_kernel reads them."""

    weights: Tensor
    biases: Tensor
    constants: dict[str, Any]


def pack(maps: Maps, others: Maps) -> Packed:
    """Both stacks, one after the other (or one alone, passed twice); packed once for all calls."""
    made = _PACKED.setdefault(maps, WeakKeyDictionary())
    if others not in made:
        stacks = (maps,) if maps is others else (maps, others)
        folds = max(stack.folds for stack in stacks)
        flat = [_flatten(stack, folds) for stack in stacks]
        half = all(stack.half for stack in stacks)
        weights = torch.cat([weights for weights, _ in flat])
        made[others] = Packed(
            weights.bfloat16() if half else weights,
            torch.cat([biases for _, biases in flat]),
            constants(maps) | {"FOLDS": folds},
        )
    return made[others]


def alike(maps: Maps, others: Maps) -> bool:
    """Whether one launch runs both stacks: equal widths and activations, whatever the folds."""
    return constants(maps) == constants(others)


def constants(maps: Maps) -> dict[str, Any]:
    """Constants of encode_kernel for the widths of these maps."""
    inputs = maps.weights[0].shape[1]
    widths = tuple(weight.shape[2] for weight in maps.weights[:-1])
    hidden = max(widths, default=0)
    return {
        "IN": inputs,
        "IN_SLOTS": _slots(inputs),
        "WIDTHS": widths,
        "HIDDEN": _slots(hidden),
        "BITS": maps.bits,
        "BIT_SLOTS": next_power_of_2(maps.bits),
        "DEPTH": len(maps.weights),
        "ACTIVATION": maps.activation,
    }


def _flatten(maps: Maps, folds: int) -> tuple[Tensor, Tensor]:
    """Weights (maps, numbers) and biases (maps, numbers), stages padded with zeros to the slots,
    and folds with steps of 0, which change nothing."""
    sizes = constants(maps)
    widths = [sizes["IN_SLOTS"], *[sizes["HIDDEN"]] * (len(maps.weights) - 1), sizes["BIT_SLOTS"]]
    weights, biases = [], []
    stages = zip(maps.weights, maps.biases, widths[:-1], widths[1:], strict=True)
    for weight, bias, inputs, outputs in stages:
        grow = (0, outputs - weight.shape[2], 0, inputs - weight.shape[1])
        weights.append(F.pad(weight.detach().float(), grow).flatten(1))
        biases.append(F.pad(bias.detach().float(), (0, outputs - bias.shape[1])))
    if folds:
        steps = biases[0].new_zeros(maps.heads, folds, sizes["BIT_SLOTS"])
        if maps.folds:
            steps[:, : maps.folds, : maps.bits] = maps.steps.detach()
        biases.append(steps.flatten(1))
    return torch.cat(weights, dim=1), torch.cat(biases, dim=1)


def _slots(width: int) -> int:
    """Width of a tile that holds `width` columns: a power of 2 that tensor cores take."""
    return max(16, next_power_of_2(width))


@dataclass(frozen=True)
class Grading:
    """How queries are graded: planes, what weights sum to at most, and where their steps go,
    (batch, lists, rows) float32; with slopes (lists,) float32, their costs, int64."""

    planes: int
    most: int
    steps: Tensor
    slopes: Tensor | None = None


@dataclass(frozen=True)
class Newest:
    """That a second stack encodes the newest of cached keys, and where its code goes: the storage
    of a Tiled cache.

    place: the token; or on the device, (batch,) int64, how many tokens each sequence has.
    """

    storage: Tensor
    place: int | Tensor


@dataclass(frozen=True)
class Begin:
    """What the first launch of a step writes beside codes, for selection and for the receipt.

    heavy, drawn (batch, lists, 1) int64, in any strides; certain (batch, lists, 1) int64: heavy
    less drawn, which go to chancy. spans (batch, 1, 2) and the cache's values, for counters.
    """

    heavy: Tensor
    certain: Tensor
    drawn: Tensor | None = None
    chancy: Tensor | None = None
    spans: Tensor | None = None
    values: Tensor | None = None
    counters: Tensor | None = None


def encode(
    x: Tensor, maps: Maps, out: Tensor, other: tuple[Tensor, Maps, Tensor | Newest] | None = None,
    *, grading: Grading | None = None, begin: Begin | None = None,
) -> None:  # fmt: skip
    """Codes of x (batch, heads, rows, in) into `out` (batch, maps, rows, words) int32, or graded
    ones (batch, lists, rows, words, 1 + planes) of the sums over a list's maps.

    other: (x, maps, out) of a second stack, whose codes are plain; it runs alone if `out` has no
    maps or lists.
    """
    batch, heads, rows, _ = x.shape
    x2, maps2, out2 = (x, maps, out) if other is None else other
    newest = out2 if isinstance(out2, Newest) else None
    out2 = out2 if newest is None else newest.storage
    placed = newest is not None and isinstance(newest.place, Tensor)
    places = newest.place if placed else out
    programs = out.shape[1]
    rows = rows if programs else 0
    rows2 = 0 if other is None else 1 if newest is not None else x2.shape[2]
    packed = pack(maps, maps2)
    sizes = packed.constants
    config = configs.encode_config(
        max(rows, rows2),
        sizes["IN_SLOTS"],
        max(sizes["HIDDEN"], sizes["BIT_SLOTS"]),
        sizes["DEPTH"],
        x.dtype,
        packed.weights.dtype == torch.bfloat16,
        grading is not None,
    )
    total = programs + (maps2.heads if other is not None else 0)
    grid = (cdiv(max(rows, rows2), config.block), total, batch)
    steps = out if grading is None else grading.steps
    slopes = None if grading is None else grading.slopes
    planes, most = (0, 0) if grading is None else (grading.planes, grading.most)
    counters = None if begin is None else begin.counters
    heavy = out if begin is None else begin.heavy
    drawn = heavy if slopes is None or begin is None else begin.drawn
    values = x2 if counters is None else begin.values
    value_dim = 0 if counters is None else values.shape[3]
    with on(x):
        encode_kernel[grid](
            x, x2, packed.weights, packed.biases, out, out2, steps,
            steps if slopes is None else slopes, places,
            heavy, drawn, out if begin is None else begin.certain,
            drawn if drawn is heavy else begin.chancy,
            out if counters is None else begin.spans, values,
            out if counters is None else counters,
            *x.stride()[:3], *x2.stride()[:3], out2.stride(0), out2.stride(1),
            places.stride(0), 0 if newest is None or placed else newest.place,
            *heavy.stride()[:2], *drawn.stride()[:2], *values.stride()[:3],
            programs, 0 if begin is None else begin.certain.shape[1],
            0 if maps2 is maps else maps.heads, maps.heads // heads, maps2.heads // x2.shape[1],
            rows, rows2,
            **sizes, GROUP=maps.heads // programs if programs else 1, PLANES=planes, MOST=most,
            BLOCK=config.block,
            TILED=newest is not None, PLACED=placed, PRICED=slopes is not None,
            STEP=begin is not None, VALUE_DIM=value_dim, VALUE_SLOTS=_slots(value_dim),
            num_warps=config.warps,
        )  # fmt: skip


@dataclass(frozen=True)
class SelectSpace:
    """Memory of a selection over up to `chunks` chunks a row; `done` must be 0 before first use.

    The levels take most: one or two bytes for each row and token. Nothing in it outlives a call, so
    layers whose steps follow one another may share it.
    """

    config: configs.Select
    chunks: int
    levels: Tensor
    histogram: Tensor
    done: Tensor
    plan: Tensor
    prefix: Tensor

    @classmethod
    def reserve(
        cls,
        rows: int,
        tokens: int,
        group: int,
        words: int,
        device: torch.device,
        grades: int = 0,
        most: int | None = None,
    ) -> SelectSpace:
        """For `rows` lists over up to `tokens` tokens."""
        tiles = cdiv(tokens, TILE)
        config = configs.select_config(group, words, grades, rows, tiles, device, most)
        chunks = cdiv(tiles, config.tiles)

        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            config,
            chunks,
            numbers(rows, chunks, config.tiles * TILE // config.pack),
            numbers(rows, chunks, configs.BINS.value),
            numbers(rows).zero_(),
            numbers(rows, 4),
            numbers(rows, chunks, 2),
        )


def select(
    query_codes: Tensor,
    keys: Tiled,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    indices: Tensor,
    space: SelectSpace,
) -> None:
    """Token lists into indices (batch, lists, q, width) int32.

    query_codes (batch, heads, q, words), or graded (batch, lists, q, words, 1 + planes); heavy
    (batch, lists, q) and spans (batch, q, 2), int64.
    """
    with on(keys.storage):
        grid, sizes = _plan(query_codes, keys, heavy, spans, sink, local, indices, space)
        compact_kernel[grid](
            spans, space.levels, space.plan, space.prefix, indices, *sizes,
            **space.config.storing, **configs.SELECT_OPTIONS,
        )  # fmt: skip


def _plan(
    query_codes: Tensor, keys: Tiled, heavy: Tensor, spans: Tensor, sink: int, local: int,
    indices: Tensor, space: SelectSpace,
) -> tuple[tuple[int, int], tuple[int, ...]]:  # fmt: skip
    """Levels, threshold and places of the chunks; returns the grid and sizes of what reads them."""
    batch, lists, q_len, width = indices.shape
    storage, config = keys.storage, space.config
    grid = (space.chunks, batch * lists * q_len)
    kept = (space.levels, space.histogram, space.done, space.plan, space.prefix, indices)
    histogram_kernel[grid](
        query_codes, storage, spans, heavy, *kept, *storage.stride()[:2], sink, local,
        space.chunks, lists, lists // storage.shape[1], q_len, width,
        **config.counting, **config.options,
    )  # fmt: skip
    sizes = sink, local, space.chunks, lists, q_len, width
    for digit in config.refining:
        refine_kernel[grid](spans, heavy, *kept, *sizes, **digit, **configs.SELECT_OPTIONS)
    return grid, sizes


def sample(
    query_codes: Tensor, keys: Tiled, units: Tensor, certain: Tensor, drawn: Tensor, trust: int,
    coins: Coins, spans: Tensor, sink: int, local: int, indices: Tensor, log_weights: Tensor,
    space: SelectSpace,
) -> None:  # fmt: skip
    """Token lists into indices (batch, lists, q, width) int32, and their log weights, float32.

    units, certain and drawn (batch, lists, q) int64; other arguments as of `select`.
    """
    device, config, rows = keys.storage.device, space.config, space.plan.shape[0]
    draw = torch.empty(rows, 2, dtype=torch.int32, device=device)
    counts = torch.empty(rows, space.chunks, dtype=torch.int32, device=device)
    table, chances, logarithms = (
        coin_table(device, name) for name in ("TABLE", "CHANCES", "LOG_WEIGHTS")
    )
    state = coins.state - (coins.state >> 31 << 32)  # as a signed word
    of_coins = state, coins.first_list, int(coins.fresh)
    read = spans, space.levels, space.plan
    rules = space.prefix, drawn, units, draw, table, counts
    with on(keys.storage):
        grid, sizes = _plan(query_codes, keys, certain, spans, sink, local, indices, space)
        survey_kernel[(rows,)](
            *read, drawn, units, chances, draw, *sizes[:5], trust,
            **config.surveying, **configs.SELECT_OPTIONS,
        )  # fmt: skip
        tally_kernel[grid](
            *read, *rules, space.done, indices, log_weights, *sizes, *of_coins, **config.storing,
            BLOCK=configs.COUNT_BLOCK, **configs.SELECT_OPTIONS,
        )  # fmt: skip
        list_kernel[grid](
            *read, *rules, logarithms, indices, log_weights, *sizes, *of_coins, **config.storing,
            **configs.SELECT_OPTIONS,
        )  # fmt: skip


def union(indices: Tensor, bitmap: Tensor, out: Tensor) -> None:
    """Unions of indices (batch, L, q, m) into out (batch, lists, q, width), both int32.

    bitmap: (batch, lists, q, words) int32, zeros.
    """
    batch, before, q_len, width = indices.shape
    lists, words = out.shape[1], bitmap.shape[3]
    grid = (cdiv(width, configs.MARK_BLOCK), batch * before * q_len)
    with on(indices):
        mark_kernel[grid](
            indices, bitmap, before // lists, lists, q_len, width, words, BLOCK=configs.MARK_BLOCK
        )
        write_kernel[(cdiv(words, configs.WRITE_BLOCK), batch * lists * q_len)](
            bitmap, out, words, out.shape[3], BLOCK=configs.WRITE_BLOCK
        )


@dataclass(frozen=True)
class AttendSpace:
    """Memory of attention over parts of lists: their outputs and log-sum-exps, and how many parts
    of each list are done, 0 before and after a launch."""

    config: configs.Attend
    split: int
    parts: Tensor
    lse: Tensor
    done: Tensor

    @classmethod
    def reserve(
        cls,
        q: Tensor,
        lists: int,
        width: int,
        value_dim: int,
        dtype: torch.dtype,
        bits: int = 0,
    ) -> AttendSpace:
        """For queries like q (batch, heads, q, head_dim) over lists of up to `width` tokens;
        bits: of rows, where they are quantised."""
        batch, heads, q_len, dim = q.shape
        rows = batch * lists * q_len
        config = configs.attend_config(max(dim, value_dim), dtype, bits)
        split = configs.split_of(width, rows, config.block, q.device)
        parts = max(1, cdiv(width, split))
        shape = (rows, heads // lists, parts)
        return cls(
            config,
            split,
            torch.empty(*shape, value_dim, device=q.device),
            torch.empty(shape, device=q.device),
            torch.zeros(rows, dtype=torch.int32, device=q.device),
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    spans: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    space: AttendSpace,
    log_weights: Tensor | None = None,
    counters: Tensor | None = None,
    bits: int = 0,
) -> None:
    """Attention to listed tokens, or to spans, into out (batch, heads, q, value_dim) and lse
    (batch, heads, q) float32; other shapes as in `api`. counters: those of counters.py, to which
    the tokens read are added."""
    batch, heads, q_len, dim = q.shape
    kv_heads, value_dim = k.shape[1], out.shape[3]
    rows, group, parts = space.lse.shape
    lists = heads // group
    config, slots = space.config, next_power_of_2(group)
    value_slots = _slots(value_dim)
    width = 0 if indices is None else indices.shape[3]
    with on(q):
        attend_kernel[(parts, rows)](
            q, k, v, spans if indices is None else indices, indices if spans is None else spans,
            space.lse if log_weights is None else log_weights, lse if sinks is None else sinks,
            space.parts, space.lse, space.done, out, lse,
            space.done if counters is None else counters, scaling, softcap or 1.0,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            lists, lists // kv_heads, q_len, width, space.split,
            GROUP=group, SLOTS=configs.head_slots(group, bits), DIM=dim,
            DIM_SLOTS=_slots(dim), VALUE_DIM=value_dim, VALUE_SLOTS=value_slots,
            BLOCK=config.block, STAGES=config.stages, LISTED=indices is not None,
            CAPPED=softcap is not None, WEIGHTED=log_weights is not None,
            HAS_SINKS=sinks is not None, COUNTED=counters is not None, HEADS=slots,
            MERGED=configs.merged(slots, value_slots), BITS=bits,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

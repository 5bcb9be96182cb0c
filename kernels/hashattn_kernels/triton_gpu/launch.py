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
from .attention import attend_kernel, merge_kernel
from .encoding import encode_kernel
from .sampling import list_kernel, survey_kernel, tally_kernel
from .selection import compact_kernel, histogram_kernel, wide_histogram_kernel
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
        flat = [_flatten(stack) for stack in stacks]
        half = all(stack.half for stack in stacks)
        weights = torch.cat([weights for weights, _ in flat])
        made[others] = Packed(
            weights.bfloat16() if half else weights,
            torch.cat([biases for _, biases in flat]),
            constants(maps),
        )
    return made[others]


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
        "FOLDS": maps.folds,
    }


def _flatten(maps: Maps) -> tuple[Tensor, Tensor]:
    """Weights (maps, numbers) and biases (maps, numbers), stages padded with zeros to the slots."""
    sizes = constants(maps)
    widths = [sizes["IN_SLOTS"], *[sizes["HIDDEN"]] * (len(maps.weights) - 1), sizes["BIT_SLOTS"]]
    weights, biases = [], []
    stages = zip(maps.weights, maps.biases, widths[:-1], widths[1:], strict=True)
    for weight, bias, inputs, outputs in stages:
        grow = (0, outputs - weight.shape[2], 0, inputs - weight.shape[1])
        weights.append(F.pad(weight.detach().float(), grow).flatten(1))
        biases.append(F.pad(bias.detach().float(), (0, outputs - bias.shape[1])))
    if maps.folds:
        steps = F.pad(maps.steps.detach().float(), (0, sizes["BIT_SLOTS"] - maps.bits))
        biases.append(steps.flatten(1))
    return torch.cat(weights, dim=1), torch.cat(biases, dim=1)


def _slots(width: int) -> int:
    """Width of a tile that holds `width` columns: a power of 2 that tensor cores take."""
    return max(16, next_power_of_2(width))


def encode(
    x: Tensor, maps: Maps, out: Tensor, other: tuple[Tensor, Maps, Tensor, Tensor | None] | None
) -> None:
    """Codes of x (batch, heads, rows, in) into `out` (batch, maps, rows, words) int32.

    other: (x, maps, out, spans) of a second stack; with spans (batch, 1, 2) int64 its `out` is the
    storage of a Tiled code cache.
    """
    batch, heads, rows, _ = x.shape
    x2, maps2, out2, spans = (x, maps, out, None) if other is None else other
    rows2 = x2.shape[2] if other is not None else 0
    packed = pack(maps, maps2)
    sizes = packed.constants
    config = configs.encode_config(
        max(rows, rows2),
        sizes["IN_SLOTS"],
        max(sizes["HIDDEN"], sizes["BIT_SLOTS"]),
        sizes["DEPTH"],
        x.dtype,
        packed.weights.dtype == torch.bfloat16,
    )
    total = maps.heads + (maps2.heads if other is not None else 0)
    grid = (cdiv(max(rows, rows2), config.block), total, batch)
    with on(x):
        encode_kernel[grid](
            x, x2, packed.weights, packed.biases, out, out2, out if spans is None else spans,
            *x.stride()[:3], *x2.stride()[:3], out2.stride(0), out2.stride(1),
            maps.heads, packed.weights.shape[0], maps.heads // heads, maps2.heads // x2.shape[1],
            rows, rows2,
            **sizes, BLOCK=config.block, TILED=spans is not None,
            num_warps=config.warps,
        )  # fmt: skip


@dataclass(frozen=True)
class SelectSpace:
    """Memory of a selection over up to `chunks` chunks a row; `done` must be 0 before first use."""

    config: configs.Select
    chunks: int
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
            numbers(rows, chunks, 32 * config.hot),
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
    batch, lists, q_len, width = indices.shape
    storage, config = keys.storage, space.config
    sizes = (
        *storage.stride()[:2], sink, local, space.chunks, lists, lists // storage.shape[1],
        q_len, width,
    )  # fmt: skip
    grid = (space.chunks, batch * lists * q_len)
    with on(storage):
        _count_levels(query_codes, storage, spans, heavy, indices, space, grid, sizes)
        compact_kernel[grid](
            query_codes, storage, spans, space.plan, space.prefix, indices, *sizes,
            **config.scoring, num_warps=configs.WARPS,
        )  # fmt: skip


def _count_levels(
    query_codes: Tensor, storage: Tensor, spans: Tensor, heavy: Tensor, indices: Tensor,
    space: SelectSpace, grid: tuple[int, int], sizes: tuple[int, ...],
) -> None:  # fmt: skip
    config = space.config
    count = wide_histogram_kernel if config.wide else histogram_kernel
    count[grid](
        query_codes, storage, spans, heavy, space.histogram, space.done, space.plan, space.prefix,
        indices, *sizes, **config.counting, num_warps=configs.WARPS,
    )  # fmt: skip


def sample(
    query_codes: Tensor, keys: Tiled, units: Tensor, certain: Tensor, drawn: Tensor, trust: int,
    coins: Coins, spans: Tensor, sink: int, local: int, indices: Tensor, log_weights: Tensor,
    space: SelectSpace,
) -> None:  # fmt: skip
    """Token lists into indices (batch, lists, q, width) int32, and their log weights, float32.

    units, certain and drawn (batch, lists, q) int64; other arguments as of `select`.
    """
    batch, lists, q_len, width = indices.shape
    storage, config, rows = keys.storage, space.config, batch * lists * q_len
    share = lists // storage.shape[1]
    sizes = (*storage.stride()[:2], sink, local, space.chunks, lists, share, q_len, width)
    grid = (space.chunks, rows)
    draw = torch.empty(rows, 2, dtype=torch.int32, device=storage.device)
    counts = torch.empty(rows, space.chunks, dtype=torch.int32, device=storage.device)
    table, chances, logarithms = (
        coin_table(storage.device, name) for name in ("TABLE", "CHANCES", "LOG_WEIGHTS")
    )
    state = coins.state - (coins.state >> 31 << 32)  # as a signed word
    of_coins = state, coins.first_list, int(coins.fresh)
    kept = (
        query_codes, storage, spans, space.plan, space.prefix, drawn, units, draw, table, counts,
    )  # fmt: skip
    with on(storage):
        _count_levels(query_codes, storage, spans, certain, indices, space, grid, sizes)
        survey_kernel[(rows,)](
            query_codes, storage, spans, drawn, units, space.plan, chances, draw,
            *sizes[:4], *sizes[5:8], trust, **config.surveying, num_warps=configs.WARPS,
        )  # fmt: skip
        tally_kernel[grid](
            *kept, space.done, indices, log_weights, *sizes, *of_coins, **config.scoring,
            BLOCK=configs.COUNT_BLOCK, num_warps=configs.WARPS,
        )  # fmt: skip
        list_kernel[grid](
            *kept, logarithms, indices, log_weights, *sizes, *of_coins, **config.scoring,
            num_warps=configs.WARPS,
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
    """Memory of attention over parts of lists: their outputs and log-sum-exps."""

    config: configs.Attend
    split: int
    parts: Tensor
    lse: Tensor

    @classmethod
    def reserve(
        cls, q: Tensor, lists: int, width: int, value_dim: int, dtype: torch.dtype
    ) -> AttendSpace:
        """For queries like q (batch, heads, q, head_dim) over lists of up to `width` tokens."""
        batch, heads, q_len, dim = q.shape
        rows = batch * lists * q_len
        config = configs.attend_config(max(dim, value_dim), dtype)
        split = configs.split_of(width, rows, config.block, q.device)
        parts = max(1, cdiv(width, split))
        shape = (rows, heads // lists, parts)
        return cls(
            config,
            split,
            torch.empty(*shape, value_dim, device=q.device),
            torch.empty(shape, device=q.device),
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
) -> None:
    """Attention to listed tokens, or to spans, into out (batch, heads, q, value_dim) and lse
    (batch, heads, q) float32; other shapes as in `api`."""
    batch, heads, q_len, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    rows, group, parts = space.lse.shape
    lists = heads // group
    config, slots = space.config, next_power_of_2(group)
    value_slots = _slots(value_dim)
    width = 0 if indices is None else indices.shape[3]
    with on(q):
        attend_kernel[(parts, rows)](
            q, k, v, spans if indices is None else indices, indices if spans is None else spans,
            space.lse if log_weights is None else log_weights,
            space.parts, space.lse, scaling, softcap or 1.0,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            lists, lists // kv_heads, q_len, width, space.split,
            GROUP=group, SLOTS=1 if group == 1 else max(16, slots), DIM=dim,
            DIM_SLOTS=_slots(dim), VALUE_DIM=value_dim, VALUE_SLOTS=value_slots,
            BLOCK=config.block, STAGES=config.stages, LISTED=indices is not None,
            CAPPED=softcap is not None, WEIGHTED=log_weights is not None,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        merge_kernel[(rows * group,)](
            space.parts, space.lse, lse if sinks is None else sinks, out, lse, parts, lists, q_len,
            GROUP=group, VALUE_DIM=value_dim, VALUE_SLOTS=value_slots,
            BLOCK=configs.MERGE_BLOCK, HAS_SINKS=sinks is not None,
        )  # fmt: skip

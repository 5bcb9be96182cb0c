"""Latency of one decode step of one layer on the CPU: ours, torch's, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.base.checks import require
from hashattn.base.layout import Layout
from hashattn.hashing.maps import LayerMaps
from hashattn.kernels import available, encode_pair, hamming_scores
from hashattn.reproduce.bench.record import protocol_of
from hashattn.reproduce.bench.step import QUERIES, TORCH_DENSE, DecodeStep, Shape
from hashattn.reproduce.bench.timing import FLUSH_BYTES, Clock, Stages, Variant, measure

LISTS = {"hash": "per_kv_head", "hash_query_lists": "per_query_head"}
PEERS = ("roofline", "fallback", "union", "selection")


@torch.no_grad()
def layer_latency(
    n: int,
    dtype: torch.dtype = torch.float32,
    budget: Budget | None = None,
    shape: Shape | None = None,
    repeats: int = 25,
    clock: str = "wall",
    seed: int = 0,
    peers: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Milliseconds of one decode step with n cached tokens, a row for each variant and stage.

    Variants: torch's dense calls (TORCH_DENSE), "dense" (ours), "hash" (one list per KV head) and
    "hash_query_lists" (one per query head), the last two with stages encode, select, attend and
    total; and those of `peers`: "roofline" (reading what dense and hash read, computing nothing),
    "fallback" (hash without numba), "union" (the union of a group's lists), "selection" (torch.topk
    and FAISS). Rows hold ms (median), q1, q3, bytes (what the stage must read) and the protocol.
    budget defaults to a density of 1/16. clock: "wall", or "cpu" for the process's own time. Raises
    ValueError for an unknown peer or clock, RuntimeError if a variant's output is wrong.
    """
    unknown = sorted(set(peers) - set(PEERS))
    require(not unknown, "peers", unknown, f"some of {', '.join(PEERS)}")
    shape, budget = shape or Shape(), budget or Budget(density=1 / 16)
    step = DecodeStep(n, dtype, budget, shape, seed)
    check(step)
    lists = {name: step.select(layout, step.encode(layout, step.queries[0]))
             for name, layout in LISTS.items()}  # fmt: skip
    read = int((lists["hash"][0, 0, 0] >= 0).sum())
    protocol = protocol_of(clock, seed) | asdict(shape) | asdict(budget) | {
        "n": n, "dtype": str(dtype).removeprefix("torch."), "tokens_read": read,
        "density": read / n, "repeats": repeats, "flush_bytes": FLUSH_BYTES,
    }  # fmt: skip
    rows = measure(_variants(step, lists, peers), repeats, clock)
    sizes = bytes_read(step, lists)
    return [row | {"bytes": sizes.get((row["variant"], row["stage"]))} | protocol for row in rows]


@torch.no_grad()
def encode_latency(
    shapes: Mapping[str, tuple[Shape, str]], repeats: int = 15, seed: int = 0
) -> list[dict[str, Any]]:
    """Milliseconds to encode one token's queries and keys, all `shapes` interleaved.

    shapes: {name: (shape, precision of the maps)}. A row each: variant, ms (median), q1, q3, bytes
    of a layer's maps.
    """
    variants, sizes = {}, {}
    for name, (shape, precision) in shapes.items():
        maps = shape.maps("per_kv_head", seed, precision)
        queries = torch.randn(1, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16)
        keys = torch.randn(1, shape.kv_heads, 1, shape.head_dim, dtype=torch.bfloat16)
        variants[name] = lambda number, clock, q=queries, k=keys, m=maps: _no_stages(
            encode_pair(q, m.query, k, m.key)
        )
        sizes[name] = weight_bytes(maps)
    rows = measure(variants, repeats)
    return [row | {"bytes": sizes[row["variant"]]} for row in rows]


def weight_bytes(maps: LayerMaps) -> int:
    """Bytes of a layer's maps as kernels read them: two a weight where that is exact, else four."""
    sides = (maps.key, maps.query)
    return sum((2 if side.half else 4) * w.numel() for side in sides for w in side.weights)


def check(step: DecodeStep) -> None:
    """RuntimeError unless all dense variants, and attending to a list of all tokens, agree."""
    query = step.queries[0]
    tolerance = 1e-4 if query.dtype == torch.float32 else 2e-2
    expected = step.sdpa_grouped(query).float()
    all_tokens = torch.arange(step.n, dtype=torch.int32).expand(1, step.shape.kv_heads, 1, -1)
    outputs = {name: dense(step, query) for name, dense in TORCH_DENSE.items()}
    outputs |= {"dense": step.dense(query), "attend to all": step.attend(query, all_tokens)}
    for name, out in outputs.items():
        if not torch.allclose(out.float(), expected, atol=tolerance, rtol=tolerance):
            raise RuntimeError(f"{name} disagrees with sdpa_grouped on this machine")


def bytes_read(step: DecodeStep, lists: dict[str, Tensor]) -> dict[tuple[str, str], int]:
    """Bytes that each (variant, stage) must read: K and V, codes, listed rows, maps.

    lists: by variant (1, lists, 1, m) int32, -1 for padding.
    """
    shape, itemsize = step.shape, step.keys.element_size()
    row = 2 * shape.head_dim * itemsize
    cache_bytes = shape.kv_heads * step.n * row
    sizes = {(name, "total"): cache_bytes for name in (*TORCH_DENSE, "dense", "read")}
    for name, layout in LISTS.items():
        maps = step.maps[layout]
        heads = step.codes[layout].shape[1]
        stages = {
            "encode": weight_bytes(maps),
            "select": heads * step.n * shape.bits // 8,
            "attend": int((lists[name] >= 0).sum()) * row,
        }
        sizes |= {(name, stage): size for stage, size in stages.items()}
        sizes[name, "total"] = sum(stages.values())
    sizes["gather", "total"] = sizes["hash", "attend"]
    return sizes


def _variants(
    step: DecodeStep, lists: dict[str, Tensor], peers: tuple[str, ...]
) -> dict[str, Variant]:
    def query(number: int) -> Tensor:
        return step.queries[number % QUERIES]

    def sparse(layout: Layout, backend: str | None = None) -> Variant:
        return lambda number, clock: step.sparse(layout, query(number), clock, backend)[1]

    dense = TORCH_DENSE | {"dense": DecodeStep.dense}
    variants: dict[str, Variant] = {
        name: lambda number, clock, call=call: _no_stages(call(step, query(number)))
        for name, call in dense.items()
    }
    variants |= {name: sparse(layout) for name, layout in LISTS.items()}
    if "fallback" in peers:
        variants |= {f"{name}_numpy": sparse(layout, "numpy") for name, layout in LISTS.items()}
    if "union" in peers:
        variants["hash_union"] = lambda number, clock: step.union(query(number), clock)[1]
    if "roofline" in peers and available("numba"):
        variants |= _roofline(step, lists["hash"])
    return variants | (_selection(step) if "selection" in peers else {})


def _no_stages(output: Any) -> None:
    """Drops a call's output, since `measure` takes what a variant returns for its stages."""


def _roofline(step: DecodeStep, indices: Tensor) -> dict[str, Variant]:
    from hashattn_kernels.numba_cpu.roofline import gather, read

    row = 2 * step.shape.head_dim * step.keys.element_size()
    both = step.near_keys._base if step.near_keys._base is not None else step.near_keys
    heads = torch.arange(step.shape.kv_heads)[:, None]
    starts = ((heads * step.n + indices[0, :, 0]) * row).reshape(-1).numpy().astype(np.int64)
    return {
        "read": lambda number, clock: read(both),
        "gather": lambda number, clock: gather(both, starts, row),
    }


def _selection(step: DecodeStep) -> dict[str, Variant]:
    """The selection step alone beside its peers, one list per KV head (FAISS: per query head)."""
    query = step.encode("per_kv_head", step.queries[0])
    scores = hamming_scores(query, step.codes["per_kv_head"])
    heavy = int(step.plan.heavy)
    distances = (int(scores.max()) - scores).to(torch.int32)

    variants: dict[str, Variant] = {
        "topk": lambda number, clock: _no_stages(
            distances.topk(heavy, dim=-1, largest=False, sorted=False)
        ),
        "select_shared_codes": lambda number, clock: _no_stages(
            step.select("per_kv_head", query, lists=step.shape.query_heads)
        ),
    }
    if available("numba"):
        from hashattn_kernels.numba_cpu.backend import smallest

        levels = distances[0, :, 0].to(torch.uint8)
        variants["threshold"] = lambda number, clock: _no_stages(smallest(levels, heavy))
    return variants | _faiss(step, query, heavy)


def _faiss(step: DecodeStep, query: Tensor, heavy: int) -> dict[str, Variant]:
    """FAISS's exhaustive binary search, one index per KV head, the group's queries together."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    codes = step.codes["per_kv_head"].to_tokens()[0].contiguous().numpy().view(np.uint8)
    queries = query[0, :, 0].contiguous().numpy().view(np.uint8)
    queries = queries.reshape(step.shape.kv_heads, step.shape.group, -1)
    indexes = []
    for head in codes:
        index = faiss.IndexBinaryFlat(step.shape.bits)
        index.use_heap = False  # counting by distance is three times as fast here
        index.add(head)
        indexes.append(index)

    def search(number: int, clock: Clock) -> Stages | None:
        for index, group in zip(indexes, queries, strict=True):
            index.search(group, heavy)

    return {"faiss": search}

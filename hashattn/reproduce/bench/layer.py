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
from hashattn.hashing.maps import LayerMaps
from hashattn.kernels import available, encode_pair, hamming_scores
from hashattn.reproduce.bench.record import protocol_of
from hashattn.reproduce.bench.step import QUERIES, TORCH_DENSE, DecodeStep, Lists
from hashattn.reproduce.bench.timing import CLOCKS, FLUSH_BYTES, Clock, Stages, Variant, measure
from hashattn.reproduce.bench.ways import DEFAULT, WAYS, Shape, Way

PEERS = ("roofline", "fallback", "union", "selection")
_STAGED = "staged"  # the total of a step made of one call a stage
_OF_PEERS = "paper_kv_lists"  # what torch.topk and FAISS can select: matching bits
_GATHERED = "default_kv_lists"  # whose rows the roofline gathers


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
    ways: Mapping[str, Way] = WAYS,
) -> list[dict[str, Any]]:
    """Milliseconds of one decode step with n cached tokens, a row for each variant and stage.

    Variants: `ways`, torch's dense calls (TORCH_DENSE), "dense" (ours), and those of `peers`:
    "roofline" (reading what dense and sparse read, computing nothing), "fallback" (the default
    without numba), "union" (the default reading the union of a group's lists), "selection"
    (torch.topk and FAISS). A way's "total" is one call, as the package runs it; encode, select,
    attend and their sum "staged" are of the same step as one call a stage. Rows hold ms (median),
    q1, q3, bytes (what the stage must read), tokens_read (of a list) and the protocol. budget
    defaults to a density of 1/16. clock: "wall", or "cpu" for the process's own time. Raises
    ValueError for an unknown peer or clock, RuntimeError if a variant's output is wrong.
    """
    unknown = sorted(set(peers) - set(PEERS))
    require(not unknown, "peers", unknown, f"some of {', '.join(PEERS)}")
    shape, budget = shape or Shape(), budget or Budget(density=1 / 16)
    step = DecodeStep(n, dtype, budget, shape, seed, ways)
    lists = check(step)
    protocol = protocol_of(clock, seed) | {
        "n": n, "dtype": str(dtype).removeprefix("torch."), "repeats": repeats,
        "flush_bytes": FLUSH_BYTES, **asdict(shape), "sink": budget.sink, "local": budget.local,
        "heavy": budget.heavy, "density": budget.density,
    }  # fmt: skip
    rows = measure(_variants(step, lists, peers), repeats, clock)
    sizes, read = bytes_read(step, lists), {name: _read(part) for name, part in lists.items()}
    found = []
    for row in map(_named, rows):
        tokens = read.get(row["variant"])
        found.append(
            row
            | {"bytes": sizes.get((row["variant"], row["stage"])), "tokens_read": tokens}
            | protocol
        )
    return found


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A measured row by its way: the staged calls are measured under a name of their own."""
    name, staged, _ = row["variant"].partition(f" {_STAGED}")
    if staged and row["stage"] == "total":
        return row | {"variant": name, "stage": _STAGED}
    return row | {"variant": name}


def _read(lists: Lists) -> float:
    """Tokens that a list reads, on average."""
    indices = lists[0]
    return float((indices >= 0).sum()) / indices.shape[1]


@torch.no_grad()
def encode_latency(
    maps: Mapping[str, tuple[Way, str]],
    repeats: int = 15,
    seed: int = 0,
    shape: Shape | None = None,
) -> list[dict[str, Any]]:
    """Milliseconds to encode one token's queries and keys, all `maps` interleaved.

    maps: {name: (a way, the precision of its maps)}. A row each: variant, ms (median), q1, q3,
    bytes of a layer's maps.
    """
    variants, sizes, shape = {}, {}, shape or Shape()
    for name, (way, precision) in maps.items():
        made = way.maps(shape, seed, precision)
        queries = torch.randn(1, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16)
        keys = torch.randn(1, shape.kv_heads, 1, shape.head_dim, dtype=torch.bfloat16)
        variants[name] = lambda number, clock, q=queries, k=keys, m=made: _no_stages(
            encode_pair(q, m.query, k, m.key)
        )
        sizes[name] = weight_bytes(made)
    rows = measure(variants, repeats)
    return [row | {"bytes": sizes[row["variant"]]} for row in rows]


def weight_bytes(maps: LayerMaps) -> int:
    """Bytes of a layer's maps as kernels read them: two a weight where that is exact, else four."""
    sides = (maps.key, maps.query)
    return sum((2 if side.half else 4) * w.numel() for side in sides for w in side.weights)


def check(step: DecodeStep) -> dict[str, Lists]:
    """RuntimeError unless all dense variants, and attending to a list of all tokens, agree, and
    every way's one call with its calls by stage; what each way reads for the first query."""
    query, clock = step.queries[0], CLOCKS["wall"]
    tolerance = 1e-4 if query.dtype == torch.float32 else 2e-2
    expected = step.sdpa_grouped(query).float()
    all_tokens = torch.arange(step.n, dtype=torch.int32).expand(1, step.shape.kv_heads, 1, -1)
    outputs = {name: dense(step, query) for name, dense in TORCH_DENSE.items()}
    outputs |= {"dense": step.dense(query), "attend to all": step.attend(query, all_tokens)}
    for name, out in outputs.items():
        if not torch.allclose(out.float(), expected, atol=tolerance, rtol=tolerance):
            raise RuntimeError(f"{name} disagrees with sdpa_grouped on this machine")
    lists = {}
    for name in step.ways:
        out, _, lists[name] = step.fused(name, query, clock)
        other, _, read = step.staged(name, query, clock)
        close = torch.allclose(out.float(), other.float(), atol=tolerance, rtol=tolerance)
        if not (close and torch.equal(read[0], lists[name][0])):
            raise RuntimeError(f"{name}: one call and its stages disagree on this machine")
    return lists


def bytes_read(step: DecodeStep, lists: Mapping[str, Lists]) -> dict[tuple[str, str], int]:
    """Bytes that each (variant, stage) must read: K and V, codes, listed rows, maps.

    lists: what each way reads.
    """
    shape, itemsize = step.shape, step.keys.element_size()
    row = 2 * shape.head_dim * itemsize
    cache_bytes = shape.kv_heads * step.n * row
    sizes = {(name, "total"): cache_bytes for name in (*TORCH_DENSE, "dense", "read")}
    for name, (indices, _) in lists.items():
        parts = {
            "encode": weight_bytes(step.maps[name]),
            "select": shape.kv_heads * step.n * step.ways[name].bits // 8,
            "attend": int((indices >= 0).sum()) * row,
        }
        sizes |= {(name, stage): size for stage, size in parts.items()}
        sizes[name, "total"] = sizes[name, _STAGED] = sum(parts.values())
    if _GATHERED in lists:
        sizes["gather", "total"] = sizes[_GATHERED, "attend"]
    return sizes


def _variants(
    step: DecodeStep, lists: dict[str, Lists], peers: tuple[str, ...]
) -> dict[str, Variant]:
    def query(number: int) -> Tensor:
        return step.queries[number % QUERIES]

    def fused(name: str, backend: str | None = None) -> Variant:
        return lambda number, clock: step.fused(name, query(number), clock, backend)[1]

    def staged(name: str) -> Variant:
        def run(number: int, clock: Clock) -> Stages:
            spent = step.staged(name, query(number), clock)[1]
            return spent | {"total": sum(spent.values())}

        return run

    variants: dict[str, Variant] = {name: fused(name) for name in step.ways}
    dense = TORCH_DENSE | {"dense": DecodeStep.dense}
    variants |= {
        name: lambda number, clock, call=call: _no_stages(call(step, query(number)))
        for name, call in dense.items()
    }
    variants |= {f"{name} {_STAGED}": staged(name) for name in step.ways}
    if "fallback" in peers:
        variants[f"{DEFAULT}_numpy"] = fused(DEFAULT, "numpy")
    if "union" in peers:
        variants[f"{DEFAULT}_union"] = lambda number, clock: step.union(
            DEFAULT, query(number), clock
        )[1]
    if "roofline" in peers and available("numba"):
        variants |= _roofline(step, lists[_GATHERED][0])
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
    """The selection step alone beside its peers: matching bits, one list per KV head (FAISS: per
    query head)."""
    query, _ = step.encode(_OF_PEERS, step.queries[0])
    step.codes[_OF_PEERS].crop(step.n - 1)
    scores = hamming_scores(query, step.codes[_OF_PEERS])
    heavy = int(step.plans[_OF_PEERS].heavy)
    distances = (int(scores.max()) - scores).to(torch.int32)

    def shared(number: int, clock: Clock) -> None:
        step.select(_OF_PEERS, query, None, lists=step.shape.query_heads)

    variants: dict[str, Variant] = {
        "topk": lambda number, clock: _no_stages(
            distances.topk(min(heavy, step.n - 1), dim=-1, largest=False, sorted=False)
        ),
        "select_shared_codes": shared,
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
    codes = step.codes[_OF_PEERS].to_tokens()[0].contiguous().numpy().view(np.uint8)
    queries = query[0, :, 0].contiguous().numpy().view(np.uint8)
    queries = queries.reshape(step.shape.kv_heads, step.shape.group, -1)
    indexes = []
    for head in codes:
        index = faiss.IndexBinaryFlat(step.ways[_OF_PEERS].bits)
        index.use_heap = False  # counting by distance is three times as fast here
        index.add(head)
        indexes.append(index)

    def search(number: int, clock: Clock) -> Stages | None:
        for index, group in zip(indexes, queries, strict=True):
            index.search(group, heavy)

    return {"faiss": search}

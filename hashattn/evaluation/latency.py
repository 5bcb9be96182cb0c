"""Time of one decode step of one attention layer: encode, select, attend, against dense torch.

What makes the comparison honest: dense attention is whatever torch call is fastest (enable_gqa
walks the cache once per query head on a CPU), all variants run interleaved in one process on the
same tensors, and a large buffer is read before every sample, since in a real step the other layers
push this one out of the processor's caches.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hashattn.attention.budget import Budget
from hashattn.attention.tokens import token_sets, visible_tokens
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import attend, select
from hashattn.selectors.hash import HashSelector

Clock = Callable[[], float]

QUERIES = 4  # different queries in rotation, so that no selection is warm from the last sample
FLUSH_BYTES = 100 * 2**20
SPARSE = "hash"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    """Attention heads of one layer; the defaults are Llama-3.1-8B's."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads = {self.query_heads} must be a multiple of kv_heads = {self.kv_heads}"
            )


class DecodeStep:
    """One layer's cache of n tokens with its codes, and the queries to decode from it.

    Random keys, values and maps (three layers, hidden width = head_dim): the selected rows are
    scattered over the cache, the worst case for gathering them.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        budget: Budget,
        layout: str,
        bits: int,
        shape: Shape,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        cache = (2, 1, shape.kv_heads, n, shape.head_dim)
        self.keys, self.values = torch.randn(cache, generator=generator).to(dtype)
        queries = (QUERIES, 1, shape.query_heads, 1, shape.head_dim)
        self.queries = torch.randn(queries, generator=generator).to(dtype)
        config = HashConfig(
            (0,),
            shape.query_heads,
            shape.kv_heads,
            shape.head_dim,
            layout,
            bits,
            depth=3,
            hidden=shape.head_dim,
        )
        self.selector = HashSelector(HashWeights.random(config, seed))
        self.codes = self.selector.encode_keys(0, self.keys)["codes"]
        self.budget, self.scaling = budget, shape.head_dim**-0.5

    def select(self, query_codes: Tensor) -> Tensor:
        """The index lists of one query (B, lists, 1, m) from its codes."""
        scores = self.selector.match(query_codes, self.codes)
        visible = visible_tokens(None, 1, self.codes.shape[2], self.codes.device)
        sets = token_sets(visible, self.budget)
        return select(scores, sets.heavy, sets.candidates, sets.always)

    def sparse(
        self, query: Tensor, clock: Clock = time.perf_counter
    ) -> tuple[Tensor, dict[str, float]]:
        """The attention output (B, query heads, 1, D) and the seconds of each stage.

        encode holds both sides: this query's codes and those of the one new key.
        """
        marks = [clock()]
        codes = self.selector.encode_queries(0, query)
        self.selector.encode_keys(0, self.keys[:, :, -1:])
        marks.append(clock())
        indices = self.select(codes)
        marks.append(clock())
        out = attend(query, self.keys, self.values, indices, self.scaling)
        marks.append(clock())
        spans = [end - start for start, end in zip(marks, marks[1:], strict=False)]
        stages = dict(zip(("encode", "select", "attend"), spans, strict=True))
        return out, stages | {"total": marks[-1] - marks[0]}

    def sdpa_gqa(self, query: Tensor) -> Tensor:
        """torch's SDPA with enable_gqa."""
        return scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)

    def sdpa_grouped(self, query: Tensor) -> Tensor:
        """SDPA with the query heads of a group as rows of one KV head."""
        out = scaled_dot_product_attention(self._grouped(query), self.keys, self.values)
        return out.reshape(query.shape)

    def matmul(self, query: Tensor) -> Tensor:
        """Two matrix products around a float32 softmax."""
        logits = self._grouped(query) @ self.keys.transpose(-1, -2) * self.scaling
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ self.values).reshape(query.shape)

    def _grouped(self, query: Tensor) -> Tensor:
        return query.view(1, self.keys.shape[1], -1, query.shape[-1])


BASELINES: dict[str, Callable[[DecodeStep, Tensor], Tensor]] = {
    "sdpa_gqa": DecodeStep.sdpa_gqa,
    "sdpa_grouped": DecodeStep.sdpa_grouped,
    "matmul": DecodeStep.matmul,
}


@torch.no_grad()
def decode_latency(
    n: int,
    dtype: torch.dtype = torch.float32,
    budget: Budget | None = None,
    layout: str = "per_kv_head",
    bits: int = 32,
    shape: Shape | None = None,
    repeats: int = 25,
    clock: str = "wall",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Milliseconds of one decode step of one layer with n cached tokens.

    One row for each stage of the sparse step (variant "hash"; stages encode, select, attend, total)
    and one for each dense baseline (stage "total"): ms (median), q1, q3 of `repeats` interleaved
    samples, and the protocol they were taken under. budget defaults to a density of 1/16. clock:
    "wall", or "cpu" for the process's own time, which other programs on the machine disturb less.
    Raises ValueError for repeats < 1 or an unknown clock, RuntimeError if the dense baselines
    disagree with each other.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats} must be at least 1")
    if clock not in CLOCKS:
        raise ValueError(f"clock = {clock!r} must be one of {sorted(CLOCKS)}")
    shape, budget = shape or Shape(), budget or Budget(density=1 / 16)
    step = DecodeStep(n, dtype, budget, layout, bits, shape, seed)
    tokens = _check(step)
    protocol = {
        "n": n, "dtype": str(dtype).removeprefix("torch."), "layout": layout, "bits": bits,
        **asdict(shape), "tokens_read": tokens, "density": tokens / n, "repeats": repeats,
        "clock": clock, "threads": torch.get_num_threads(), "flush_bytes": FLUSH_BYTES,
        "seed": seed, "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    samples: dict[tuple[str, str], list[float]] = {}
    for variant, stage, seconds in _interleaved(step, repeats, CLOCKS[clock]):
        samples.setdefault((variant, stage), []).append(seconds)
    return [_row(variant, stage, values) | protocol for (variant, stage), values in samples.items()]


def speedup_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One line for each length, dtype and layout: the sparse step against the fastest dense one."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["stage"] == "total"]
    lines = []
    for (dtype, layout, n), part in frame.groupby(["dtype", "layout", "n"], sort=False):
        times = part.groupby("variant")["ms"].min()
        dense = times.drop(SPARSE)
        lines.append({
            "n": n, "dtype": dtype, "layout": layout, "density": part["density"].iloc[0],
            "best_dense": dense.idxmin(), "dense_ms": dense.min(), "sparse_ms": times[SPARSE],
            "speedup": dense.min() / times[SPARSE],
        })  # fmt: skip
    return pd.DataFrame(lines)


def _interleaved(step: DecodeStep, repeats: int, clock: Clock) -> Iterator[tuple[str, str, float]]:
    """(variant, stage, seconds) of every sample, after one warm-up round."""
    buffer = torch.ones(FLUSH_BYTES // 4)
    for round_ in range(-1, repeats):
        query = step.queries[round_ % QUERIES]
        for variant, dense in BASELINES.items():
            buffer.sum()
            start = clock()
            dense(step, query)
            seconds = clock() - start
            if round_ >= 0:
                yield variant, "total", seconds
        buffer.sum()
        _, stages = step.sparse(query, clock)
        if round_ >= 0:
            yield from ((SPARSE, stage, seconds) for stage, seconds in stages.items())


def _row(variant: str, stage: str, seconds: list[float]) -> dict[str, Any]:
    low, middle, high = (torch.tensor(seconds).double() * 1e3).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    times = {"ms": float(middle), "q1": float(low), "q3": float(high)}
    return {"variant": variant, "stage": stage} | times


def _check(step: DecodeStep) -> int:
    """Tokens one query reads; the dense variants must agree before any of them is timed."""
    query = step.queries[0]
    outs = {name: dense(step, query).float() for name, dense in BASELINES.items()}
    tolerance = 1e-4 if query.dtype == torch.float32 else 2e-2
    reference = outs["sdpa_grouped"]
    for name, out in outs.items():
        if not torch.allclose(out, reference, atol=tolerance, rtol=tolerance):
            raise RuntimeError(f"dense baseline {name} disagrees with sdpa_grouped on this machine")
    indices = step.select(step.selector.encode_queries(0, query))
    return int((indices[0, 0, 0] >= 0).sum())

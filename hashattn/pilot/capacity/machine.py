"""What this machine's processor takes for the parts of a decode step: some seconds of measuring.

Dense attention, a sparse step (encode, select, attend: what hashattn runs) and a matrix-vector
product, on random numbers of a model's shapes, interleaved, with cold caches. A line through the
medians over cached tokens gives a cost a layer that does not depend on them and one a token. Only
kernels are timed: what Python and the rest of a model add is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan
from hashattn.base.checks import INT32_MAX, is_count, require, require_numbers
from hashattn.base.environment import processor
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json, write_json
from hashattn.base.layout import Layout, check_layout
from hashattn.hashing.maps import HashConfig, random_maps
from hashattn.kernels import (
    attend,
    dense_decode,
    encode,
    grade_bits,
    layout_for,
    preactivations,
    select_by_codes,
)
from hashattn.pilot.capacity.shapes import ModelShape

TOKENS = (4096, 16384)  # cached, of the two caches that are timed
_FLUSH_BYTES = 100 << 20  # read before every sample: the other layers empty the caches in a step
_MATRIX_BYTES = 64 << 20  # above what processors cache
_QUERIES = 4  # in rotation, so that no selection is still cached from the last sample
_FORMAT = 1


class MeasurementError(HashAttnError, ValueError):
    """A file holds no measurement, or one of other shapes."""


@dataclass(frozen=True)
class Line:
    """Seconds of a layer with n cached tokens: fixed + per_token * n."""

    fixed: float
    per_token: float

    def __post_init__(self) -> None:
        require_numbers(vars(self), positive=("per_token",), not_negative=("fixed",))

    def seconds(self, tokens: int) -> float:
        """Of a layer with `tokens` cached tokens."""
        return self.fixed + self.per_token * tokens

    @classmethod
    def through(cls, tokens: Sequence[int], seconds: Sequence[float]) -> Line:
        """The least-squares line; one through the origin where that has a negative fixed part, and
        the last point's where it falls (times too short to be told apart)."""
        n = len(tokens)
        mean_x, mean_y = sum(tokens) / n, sum(seconds) / n
        width = sum((x - mean_x) ** 2 for x in tokens)
        covered = sum((x - mean_x) * (y - mean_y) for x, y in zip(tokens, seconds, strict=True))
        slope = covered / width if width else 0.0
        if slope > 0 and mean_y - slope * mean_x >= 0:
            return cls(mean_y - slope * mean_x, slope)
        if slope > 0:
            products = sum(x * y for x, y in zip(tokens, seconds, strict=True))
            return cls(0.0, products / sum(x * x for x in tokens))
        return cls(0.0, seconds[-1] / tokens[-1])


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in seconds of one part with `tokens` cached tokens (0: none)."""

    part: str
    tokens: int
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """device: its name and the threads used. dense, sparse: of one layer and one sequence, the
    sparse one at `budget` (density) with codes of `bits` bits and lists per query or KV head.
    weights_bandwidth: bytes of weights a second in a matrix-vector product. took: seconds."""

    device: str
    dtype: str
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    budget: float
    bits: int
    lists: str
    weights_bandwidth: float
    dense: Line
    sparse: Line
    timings: tuple[Timing, ...]
    took: float

    def __post_init__(self) -> None:
        require_numbers(vars(self), positive=("weights_bandwidth",), not_negative=("took",))

    @property
    def dense_bandwidth(self) -> float:
        """Bytes of K and V a second that the dense kernel reads, its fixed cost left out."""
        size = torch.finfo(getattr(torch, self.dtype)).bits / 8
        return 2 * self.kv_heads * self.head_dim * size / self.dense.per_token

    def check(self, model: ModelShape, budget: float, bits: int, lists: str) -> None:
        """MeasurementError unless these shapes and settings were measured."""
        wanted = _settings(model) | {"budget": budget, "bits": bits, "lists": lists}
        other = {name: (getattr(self, name), value) for name, value in wanted.items()
                 if getattr(self, name) != value}  # fmt: skip
        if other:
            listed = ", ".join(f"{name} {was}, not {now}" for name, (was, now) in other.items())
            raise MeasurementError(f"the measurement is of {listed}: measure again")

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all; returns the path."""
        return write_json(path, {"format": _FORMAT} | asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """What `save` wrote; MeasurementError for anything else."""
        content = read_json(path, MeasurementError)
        try:
            if content.pop("format") != _FORMAT:
                raise ValueError("written by another version")
            lines = {name: Line(**content.pop(name)) for name in ("dense", "sparse")}
            timings = tuple(Timing(**timing) for timing in content.pop("timings"))
            return cls(**content, **lines, timings=timings)
        except (TypeError, ValueError, KeyError, AttributeError) as problem:
            raise MeasurementError(
                f"{path} holds no measurement ({problem}): delete it and measure again"
            ) from problem


@torch.no_grad()
def measure(
    model: ModelShape, budget: float = 1 / 16, bits: int = 64, lists: Layout = "per_query_head", *,
    tokens: Sequence[int] = TOKENS, repeats: int = 9, flush_bytes: int = _FLUSH_BYTES,
    matrix_bytes: int = _MATRIX_BYTES, seed: int = 0,
) -> Measurement:  # fmt: skip
    """Time a layer's parts on this machine's processor, batch 1: about 5 seconds for an 8B model.

    tokens: cached, two increasing numbers or more; smaller ones for smaller memory. repeats: of
    every part, after one that warms up. ValueError for bad settings.
    """
    check_layout(lists, "lists")
    require_numbers({"repeats": repeats}, counts={"repeats": 1})
    valid = len(tokens) >= 2 and all(is_count(n, 1, INT32_MAX) for n in tokens)
    valid = valid and list(tokens) == sorted(set(tokens))
    require(valid, "tokens", tokens, "two or more increasing numbers of tokens")
    start = time.perf_counter()
    dtype, generator = getattr(torch, model.dtype), torch.Generator().manual_seed(seed)
    parts: dict[tuple[str, int], Callable[[int], Tensor]] = {}
    for n in tokens:
        layer = _Layer(model, n, budget, bits, lists, generator)
        parts |= {("dense", n): layer.dense, ("sparse", n): layer.sparse}
    size = dtype.itemsize * model.hidden_size
    matrix = torch.randn(-(-matrix_bytes // size), model.hidden_size, generator=generator).to(dtype)
    vector = torch.randn(1, model.hidden_size, generator=generator).to(dtype)
    parts["weights", 0] = lambda _: linear(vector, matrix)
    timings = _timed(parts, repeats, flush_bytes)
    times = {(timing.part, timing.tokens): timing.seconds for timing in timings}
    dense, sparse = (
        Line.through(tokens, [times[part, n] for n in tokens]) for part in ("dense", "sparse")
    )
    return Measurement(
        device=f"{processor()}, {torch.get_num_threads()} threads",
        **_settings(model), budget=budget, bits=bits, lists=lists,
        weights_bandwidth=matrix.nbytes / times["weights", 0], dense=dense, sparse=sparse,
        timings=timings, took=time.perf_counter() - start,
    )  # fmt: skip


def _settings(model: ModelShape) -> dict[str, Any]:
    names = ("dtype", "query_heads", "kv_heads", "head_dim", "hidden_size")
    return {name: getattr(model, name) for name in names}


def _timed(
    parts: dict[tuple[str, int], Callable[[int], Tensor]], repeats: int, flush_bytes: int
) -> tuple[Timing, ...]:
    """Every round calls each part once, so that what else the machine does meets all alike."""
    samples: dict[tuple[str, int], list[float]] = {name: [] for name in parts}
    buffer = torch.ones(max(1, flush_bytes // 4))
    for number in range(-1, repeats):
        for name, part in parts.items():
            buffer.sum()
            start = time.perf_counter()
            part(number)
            if number >= 0:
                samples[name].append(time.perf_counter() - start)
    timings = []
    for (part, n), seconds in samples.items():
        low, high = seconds * 2 if repeats == 1 else quantiles(seconds, n=4)[::2]
        timings.append(Timing(part, n, median(seconds), low, high))
    return tuple(timings)


class _Layer:
    """The cache of one layer: random keys, values and codes, so that the rows read are scattered
    over it, and K and V of a token lie side by side, as in hashattn's own cache."""

    def __init__(
        self, model: ModelShape, n: int, budget: float, bits: int, lists: Layout,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        dtype, heads, width = getattr(torch, model.dtype), model.kv_heads, model.head_dim
        both = torch.empty(1, heads, n, 2, width, dtype=dtype)
        for part in both.split(TOKENS[0], dim=2):  # float32 numbers of a part at a time
            part.copy_(torch.randn(part.shape, generator=generator))
        self.keys, self.values = both[:, :, :, 0], both[:, :, :, 1]
        queries = torch.randn(
            _QUERIES, 1, model.query_heads, 1, width, generator=generator
        ).to(dtype)  # fmt: skip
        self.queries, self.scaling = queries, width**-0.5
        self.config = HashConfig((0,), model.query_heads, heads, width, bits=bits)
        self.maps = random_maps(self.config, generator).rounded()
        words = (1, heads, n, self.config.words)
        codes = torch.randint(-(2**31), 2**31, words, generator=generator)
        self.codes = layout_for(codes.device).from_tokens(codes.to(torch.int32))
        self.plan = make_plan(None, 1, 1, n, codes.device, Budget(density=budget))
        self.grouped = lists == "per_kv_head"

    def dense(self, number: int) -> Tensor:
        """Attention to all tokens, (1, query heads, 1, head_dim)."""
        query = self.queries[number % _QUERIES]
        return dense_decode(query, self.keys, self.values, self.scaling)

    def sparse(self, number: int) -> Tensor:
        """Encode the new key and the query, select by graded bits, attend."""
        query, plan = self.queries[number % _QUERIES], self.plan
        encode(self.keys[:, :, -1:], self.maps.key)  # its code is computed, and dropped
        pre = preactivations(query, self.maps.query)
        if self.grouped:
            pre = pre.unflatten(1, (self.config.kv_heads, -1)).sum(dim=2)
        graded = grade_bits(pre, **self.config.grades)
        indices = select_by_codes(
            graded, self.codes, plan.heavy, plan.sink, plan.local, spans=plan.spans,
            width=plan.width, most=self.config.grades["most"],
        )  # fmt: skip
        return attend(query, self.keys, self.values, indices, self.scaling)

"""`make gpu`: every kernel's tests, then one layer's decode step over the grid on a CUDA GPU, and
`generate` of a whole model.

Steps run as they would in a served model: memory reserved, sizes in device memory. "graph" rows
replay a captured CUDA graph queued behind other work, so that launches cost nothing; the others
launch on an idle device and include the host's time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hashattn_kernels
from hashattn.attention.budget import Budget
from hashattn.base.errors import HashAttnError
from hashattn.base.repository import repository
from hashattn.hashing.maps import LayerMaps
from hashattn.kernels import (
    Coins,
    Drawing,
    attend,
    encode,
    encode_graded,
    sample_by_codes,
    select_by_codes,
    units_of,
)
from hashattn.reproduce.bench import tables
from hashattn.reproduce.bench.end_to_end import (
    TWO_LAYERS_OF_8B,
    model_latency,
    random_llama,
    selectors,
)
from hashattn.reproduce.bench.layer import weight_bytes
from hashattn.reproduce.bench.record import save
from hashattn.reproduce.bench.timing import spread
from hashattn.reproduce.bench.ways import DEFAULT, WAYS, Shape, Way

SINK = LOCAL = 128
SHAPES = {"GQA": Shape(), "MHA": Shape(kv_heads=32)}
FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU so far
_COPY_BYTES = 2**30
_ROOM = 2**30  # bytes that stay free
_CHECKED = 32768  # longest context whose selections are compared with the reference's
UNION = f"{DEFAULT}_union"  # lists of the default, united for each KV head
VARIANTS = {**WAYS, UNION: WAYS[DEFAULT]}
_AT_ALL_DENSITIES = (DEFAULT, "default_kv_lists", "paper_kv_lists")
_SLOPE, _TRUST = 0.5, 0.1  # nats for a unit of graded score; Budget.trust
_TESTS = (  # run in parallel: compiling takes most of their time
    ["tests/kernels/gpu", "tests/kernels/test_attention_error.py"],
    ["tests/kernels/test_attend.py", "tests/kernels/test_non_finite.py"],
    ["tests/kernels/test_encode.py"],
    ["tests/kernels/test_select_by_codes.py"],
)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Grid:
    """What is measured: every context and batch, at all densities (1 / divisor)."""

    shapes: dict[str, Shape] = field(default_factory=lambda: dict(SHAPES))
    contexts: tuple[int, ...] = tuple(1024 * k for k in (8, 32, 128, 512, 1024))
    batches: tuple[int, ...] = (1, 32, 4)  # most interesting first, in case time runs out
    divisors: tuple[int, ...] = (32, 16, 64)
    repeats: int = 15
    seconds: float = 210  # no cell starts later
    models: tuple[int, ...] = (32768, 131072)  # cached tokens of `generate`
    model_seconds: float = 90  # no model's run starts later


class GpuClock:
    """Times calls on the GPU: caches cold, peers interleaved, medians."""

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def capture(self, call: Call) -> Call:
        """The replay of `call` captured as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def measure(self, calls: dict[Any, Call], repeats: int, wait: bool) -> dict[Any, dict]:
        """{name: median and quartiles in ms}; wait: for an idle device before each call."""
        seconds: dict[Any, list[float]] = {name: [] for name in calls}
        for number in range(-1, repeats):
            marks = {}
            for name, call in calls.items():
                self.buffer.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if wait:
                    torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                marks[name] = start, end
            torch.cuda.synchronize()
            if number >= 0:
                for name, (start, end) in marks.items():
                    seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: spread(values) for name, values in seconds.items()}

    def copy_bytes_per_second(self, repeats: int = 20) -> float:
        """Bytes read and written by a copy, per second."""
        source = torch.ones(_COPY_BYTES, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        times = self.measure({"copy": partial(target.copy_, source)}, repeats, wait=False)
        return 2 * _COPY_BYTES / times["copy"]["ms"] * 1e3


def bench(path: Path, grid: Grid | None = None) -> dict[str, Any]:
    """Check every kernel, measure the grid, print the tables, write `path`; returns what was
    written.

    Raises HashAttnError without a CUDA GPU or pytest, and, after writing, if a kernel is wrong.
    """
    if not torch.cuda.is_available():
        raise HashAttnError(
            "make gpu needs an NVIDIA GPU and a CUDA build of torch; torch "
            f"{torch.__version__} sees none: use make bench to measure the CPU"
        )
    start = time.perf_counter()
    correctness = check_kernels()
    print(f"kernels checked in {time.perf_counter() - start:.0f} s: {correctness}", flush=True)
    grid, clock = grid or Grid(), GpuClock()
    copy = clock.copy_bytes_per_second()
    print(f"copy: {copy / 1e12:.2f} TB/s", flush=True)
    rows, missing = measure_grid(grid, clock, torch.device("cuda"))
    generated, skipped = generate_rows(grid, torch.device("cuda"))
    record = {
        "protocol": protocol(grid),
        "correctness": correctness,
        "copy_bytes_per_second": copy,
        "rows": rows,
        "models": generated,
        "not_measured": missing + skipped,
        "seconds": time.perf_counter() - start,
    }
    save(path, **record)
    report(record)
    print(f"\nwritten to {path}")
    if correctness["self_test"] or not correctness["passed"]:
        raise HashAttnError(f"kernels are wrong on this GPU: {correctness}")
    return record


def check_kernels() -> dict[str, Any]:
    """The inline assembly's self-test and pytest (HashAttnError without it) of all kernels."""
    from hashattn_kernels.triton_gpu.self_test import self_test

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    options = ["-q", "-k", "(triton or gpu) and not gate", "-p", "no:cacheprovider"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=repository(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for tests in _TESTS
    ]  # fmt: skip
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        if run.returncode:
            print(output[-4000:])
    if any("No module named pytest" in output for output in outputs):
        raise HashAttnError("make gpu runs the kernels' tests with pytest: pip install pytest")
    return {
        "self_test": self_test("cuda"),
        "passed": all(run.returncode == 0 for run in runs),
        "tests": [output.strip().splitlines()[-1] for output in outputs if output.strip()],
    }


def protocol(grid: Grid) -> dict[str, Any]:
    """What holds for all rows."""
    return {
        "dtype": "bfloat16", "sink": SINK, "local": LOCAL, "repeats": grid.repeats,
        "shapes": {name: asdict(shape) for name, shape in grid.shapes.items()},
        "flush_bytes": FLUSH_BYTES, "copy_bytes": _COPY_BYTES,
        "kernels": Path(hashattn_kernels.__file__).parent.name,
        "clock": "CUDA events; graphs replayed behind other work, else launched from an idle GPU",
        "keys": "random: chosen rows are scattered over the cache",
    }  # fmt: skip


def measure_grid(grid: Grid, clock: Any, device: torch.device) -> tuple[list[dict], list[str]]:
    """Rows of all cells, and a line for each cell or variant that was left out."""
    rows, missing, start = [], [], time.perf_counter()
    for batch in grid.batches:
        for name, shape in grid.shapes.items():
            for n in grid.contexts:
                label = f"{name}, batch {batch}, {n} tokens"
                needed = _bytes_of(shape, batch, n)
                if time.perf_counter() - start > grid.seconds:
                    missing.append(f"{label}: out of time")
                elif needed > free_bytes(device):
                    missing.append(f"{label}: needs {needed / 2**30:.0f} GiB")
                else:
                    print(f"{time.perf_counter() - start:4.0f} s: {label}", flush=True)
                    cell = Cell(shape, batch, n, device)
                    measured, failed = cell.measure(grid.divisors, clock, grid.repeats)
                    rows += [{"heads": name} | row for row in measured]
                    missing += [f"{label}: {reason}" for reason in failed]
                    del cell
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return rows, missing


def generate_rows(
    grid: Grid, device: torch.device, shape: dict[str, Any] | None = None
) -> tuple[list[dict], list[str]]:
    """model_latency of a random model with a dynamic and a static cache, and a line for each run
    that was left out."""
    rows, missing, start = [], [], time.perf_counter()
    model = random_llama(shape or TWO_LAYERS_OF_8B).to(device)
    name = f"{model.config.num_hidden_layers} random layers of Llama 8B"
    ways = {way: selector for way, selector in selectors(model).items() if way != "dense"}
    for n in grid.models:
        for way, selector in ways.items():
            for static in (False, True):
                label = f"generate, {way}, {'static' if static else 'dynamic'} cache, {n} tokens"
                if time.perf_counter() - start > grid.model_seconds:
                    missing.append(f"{label}: out of time")
                    continue
                print(label, flush=True)
                budget = Budget(SINK, LOCAL, heavy=n // 32)
                try:
                    rows += model_latency(name, model, n, budget, steps=16, ways={way: selector},
                                          static=static)  # fmt: skip
                except Exception as error:  # one way to run it is missing, the rest is measured
                    missing.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
    return rows, missing


def _bytes_of(shape: Shape, batch: int, n: int) -> int:
    """Memory that a cell needs: K and V, codes of both layouts, and room to work in."""
    rows = 2 * shape.kv_heads * shape.head_dim * 2
    codes = shape.kv_heads * sum(
        {tuple(w.codes.values()): w.bits // 8 for w in WAYS.values()}.values()
    )
    return batch * n * (rows + codes) + _ROOM


def free_bytes(device: torch.device) -> float:
    """Free memory of the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


class Cell:
    """Caches of `batch` sequences of n tokens with their codes, and all ways to attend to them.

    bfloat16: keys, values (batch, KV heads, n, D), the newest token's last; q (batch, query heads,
    1, D).
    """

    def __init__(self, shape: Shape, batch: int, n: int, device: torch.device) -> None:
        self.shape, self.batch, self.n, self.device = shape, batch, n, device
        self.scaling = shape.head_dim**-0.5
        torch.manual_seed(0)
        size = (batch, shape.kv_heads, n, shape.head_dim)
        self.keys, self.values = (self._random(*size) for _ in "kv")
        self.q = self._random(batch, shape.query_heads, 1, shape.head_dim)
        stored = {self._kind(way): way.maps(shape, 0).to(device) for way in WAYS.values()}
        codes = {kind: self._encode(maps) for kind, maps in stored.items()}
        self.maps = {name: stored[self._kind(way)] for name, way in VARIANTS.items()}
        self.codes = {name: codes[self._kind(way)] for name, way in VARIANTS.items()}

    def _random(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()

    @staticmethod
    def _kind(way: Way) -> tuple:
        """What ways have in common that share codes."""
        return tuple(way.codes.values())

    def _encode(self, maps: LayerMaps) -> Any:
        from hashattn_kernels.codes import Tiled

        store = Tiled()
        store.reserve(self.batch, maps.key.heads, maps.key.bits // 32, self.n, self.device)
        for part in self.keys.split(max(1, 2**18 // self.batch), dim=2):
            store.append(encode(part, maps.key))
        return store

    def measure(
        self, divisors: tuple[int, ...], clock: Any, repeats: int
    ) -> tuple[list[dict], list[str]]:
        """Rows of this cell, and what failed in it with the reason.

        Raises RuntimeError if lists or outputs of a sparse variant are not the reference's.
        """
        calls: dict[tuple, Call] = {}
        failed: list[str] = []
        expected = None
        for name, call in self._dense():
            try:
                out = call().reshape(self.q.shape)
            except Exception as error:  # a peer that cannot run on this machine is reported
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            expected = out.float() if expected is None else expected
            if not torch.allclose(out.float(), expected, rtol=2e-2, atol=2e-2):
                failed.append(f"{name}: wrong output, not measured")
                continue
            calls[name, "total", None] = call
        sizes = {key: self._row_bytes * self.batch * self.n for key in calls}
        for divisor in divisors:
            for name in VARIANTS if divisor == divisors[0] else _AT_ALL_DENSITIES:
                step = self.sparse(name, divisor)
                step(self.q)
                self.check(name, step)
                bytes_read = self._stage_bytes(name, step)
                stages = {"total": partial(step, self.q)}
                if divisor == divisors[0]:
                    stages |= {
                        "encode": partial(step.encode, self.q),
                        "select": step.select,
                        "attend": partial(step.attend, self.q),
                    }
                for stage, call in stages.items():
                    calls[name, stage, divisor] = call
                    sizes[name, stage, divisor] = bytes_read[stage]
        calls["topk", "total", divisors[0]] = self._topk(divisors[0])
        return self._time(calls, sizes, clock, repeats, failed), failed

    def _time(
        self, calls: dict[tuple, Call], sizes: dict[tuple, int], clock: Any, repeats: int,
        failed: list[str],
    ) -> list[dict]:  # fmt: skip
        """Times each call as a graph, and whole steps also launched one by one."""
        replays = {}
        for key, call in calls.items():
            try:
                replays[key] = clock.capture(call)
            except RuntimeError as error:
                failed.append(f"{key[0]}: no CUDA graph: {str(error)[:200]}")
        whole = {key: call for key, call in calls.items() if key[1] == "total"}
        rows = []
        for graph, timed in ((True, replays), (False, whole)):
            for key, times in clock.measure(timed, repeats, wait=not graph).items():
                variant, stage, divisor = key
                rows.append({
                    "batch": self.batch, "n": self.n, "variant": variant, "stage": stage,
                    "divisor": divisor, "graph": graph, "bytes": sizes.get(key), **times,
                })  # fmt: skip
        return rows

    def sparse(self, name: str, divisor: int) -> Any:
        """The DecodeStep of a variant that selects n / divisor heavy tokens."""
        from hashattn_kernels.triton_gpu.step import DecodeStep

        way, maps, heavy = VARIANTS[name], self.maps[name], self.n // divisor
        step = DecodeStep(
            maps.query, maps.key, self.keys, self.values, heavy=heavy, sink=SINK, local=LOCAL,
            scaling=self.scaling, lists=way.lists(self.shape), union=name == UNION,
            grades=way.grades, drawing=self._drawing(way, heavy),
        )  # fmt: skip
        step.codes = self.codes[name]
        step.spans[..., 1] = self.n
        return step

    def _drawing(self, way: Way, heavy: int) -> Drawing | None:
        if not way.sampled:
            return None
        lists = way.lists(self.shape)
        slopes = torch.full((lists,), _SLOPE, device=self.device)
        drawn = torch.full((self.batch, 1, 1), round(heavy * way.sampled), device=self.device)
        return Drawing(slopes, drawn, _TRUST, Coins())

    def check(self, name: str, step: Any) -> None:
        """RuntimeError unless lists and output of a step that ran are the reference's, on the first
        sequence; longer contexts than _CHECKED are not compared."""
        if self.n > _CHECKED:
            return
        way, lists = VARIANTS[name], step.indices.shape[1]
        expected, log_weights = self._reference(way, self.maps[name], step)
        if not torch.equal(step.indices[:1], expected):
            raise RuntimeError(f"{name}: {lists} lists differ from the reference's at {self.n}")
        read = (step.indices if step.union is None else step.union)[:1]
        out = attend(self.q[:1], self.keys[:1], self.values[:1], read, self.scaling,
                     log_weights=log_weights, backend="reference")  # fmt: skip
        if not torch.allclose(step.out[:1].float(), out.float(), rtol=2e-2, atol=2e-2):
            raise RuntimeError(f"{name}: the output differs from the reference's")

    def _reference(self, way: Way, maps: LayerMaps, step: Any) -> tuple[Tensor, Tensor | None]:
        """Lists and log weights of the first sequence by the reference, from Triton's codes."""
        _, lists, _, width = step.indices.shape
        q, codes, heavy = self.q[:1], step.codes.to_tokens()[:1], step.heavy[:1]
        if way.grades is None:
            query, most = encode(q, maps.query, backend="triton"), None
        else:
            query, steps = encode_graded(q, maps.query, lists, *way.grades, backend="triton")
            most = way.grades.most
        if step.drawing is None:
            return select_by_codes(query, codes, heavy, SINK, LOCAL, lists=lists, width=width,
                                   most=most, backend="reference"), None  # fmt: skip
        slopes, drawn, trust, coins = step.drawing
        drawn = drawn[:1].expand(heavy.shape)
        return sample_by_codes(
            query, codes, units_of(steps, slopes), heavy - drawn, drawn, trust, coins, SINK, LOCAL,
            width=width, most=most, backend="reference",
        )  # fmt: skip

    @property
    def _row_bytes(self) -> int:
        """K and V of a token."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.keys.element_size()

    def _stage_bytes(self, name: str, step: Any) -> dict[str, int]:
        """Bytes that each stage must read."""
        maps = self.maps[name]
        read = step.indices if step.union is None else step.union
        row = 2 * self.shape.head_dim * self.keys.element_size()
        sizes = {
            "encode": weight_bytes(maps),
            "select": self.batch * maps.key.heads * self.n * maps.key.bits // 8,
            "attend": int((read >= 0).sum()) * row,
        }
        return sizes | {"total": sum(sizes.values())}

    def _topk(self, divisor: int) -> Call:
        """torch's top-k of as many scores as one list per query head has."""
        scores = torch.randint(0, 256, (self.batch, self.shape.query_heads, self.n),
                               dtype=torch.int32, device=self.device)  # fmt: skip
        return partial(torch.topk, scores, max(1, self.n // divisor), sorted=False)

    def _dense(self) -> Iterator[tuple[str, Call]]:
        """Dense attention by each peer, ours first: its output is what the others must give."""
        from hashattn_kernels.triton_gpu.step import DenseStep

        shape, q, keys, values = self.shape, self.q, self.keys, self.values
        dense = DenseStep(shape.query_heads, keys, values, scaling=self.scaling)
        dense.spans[..., 1] = self.n
        yield "dense", partial(dense, q)
        grouped = q.view(self.batch, shape.kv_heads, shape.group, shape.head_dim)
        yield "sdpa_grouped", partial(scaled_dot_product_attention, grouped, keys, values)
        gqa = shape.group > 1
        yield (
            "sdpa_gqa",
            partial(scaled_dot_product_attention, q, keys, values, enable_gqa=gqa),
        )
        if self.device.type == "cuda":
            yield "flex", self._flex(gqa)
            yield from self._flashinfer()

    def _flex(self, gqa: bool) -> Call:
        return lambda: flex()(self.q, self.keys, self.values, enable_gqa=gqa)

    def _flashinfer(self) -> Iterator[tuple[str, Call]]:
        """FlashInfer's batch decode, each sequence one page of its cache."""
        try:
            import flashinfer
        except ImportError:
            return
        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        pages = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        last = torch.full((self.batch,), self.n, dtype=torch.int32, device=self.device)
        wrapper.plan(
            pages, pages[:-1], last, self.shape.query_heads, self.shape.kv_heads,
            self.shape.head_dim, self.n, q_data_type=self.q.dtype, kv_data_type=self.keys.dtype,
        )  # fmt: skip
        yield "flashinfer", lambda: wrapper.run(self.q[:, :, 0], (self.keys, self.values))


@cache
def flex() -> Callable:
    """torch's FlexAttention, compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def report(record: dict[str, Any]) -> None:
    """Print a record's tables."""
    sections = {
        "speed-up over the fastest dense call, CUDA graphs": tables.gpu_speedups(record),
        "the same, launched one by one": tables.gpu_speedups(record, graph=False),
        "break-even length over the fastest dense call": tables.gpu_break_even(record),
        "stages: TB/s and share of copy": tables.gpu_stages(record),
    }
    if record["models"]:
        sections["generate: host and device"] = tables.generated(record["models"])
    for title, table in sections.items():
        print(f"\n{title}\n{table.round(3).to_string()}")
    for reason in record["not_measured"]:
        print("not measured:", reason)

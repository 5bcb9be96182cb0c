"""`make gpu`: every kernel's tests, then one layer's decode step over the grid on a CUDA GPU.

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
from hashattn.base.errors import HashAttnError
from hashattn.base.layout import Layout
from hashattn.base.repository import repository
from hashattn.kernels import attend, encode, select_by_codes
from hashattn.reproduce.bench import tables
from hashattn.reproduce.bench.layer import weight_bytes
from hashattn.reproduce.bench.record import save
from hashattn.reproduce.bench.step import Shape
from hashattn.reproduce.bench.timing import spread

SINK = LOCAL = 128
SHAPES = {"GQA": Shape(), "MHA": Shape(kv_heads=32)}
FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU so far
_COPY_BYTES = 2**30
_ROOM = 2**30  # bytes that stay free
_CHECKED = 32768  # longest context whose selections are compared with the reference's
VARIANTS = {  # layout of the codes, other options of DecodeStep
    "hash": ("per_kv_head", {}),
    "hash_query_lists": ("per_query_head", {}),
    "hash_union": ("per_query_head", {"union": True}),
}
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
    seconds: float = 330  # no cell starts later


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
    record = {
        "protocol": protocol(grid),
        "correctness": correctness,
        "copy_bytes_per_second": copy,
        "rows": rows,
        "not_measured": missing,
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


def _bytes_of(shape: Shape, batch: int, n: int) -> int:
    """Memory that a cell needs: K and V, codes of both layouts, and room to work in."""
    rows = 2 * shape.kv_heads * shape.head_dim * 2
    codes = 2 * shape.query_heads * shape.bits // 8
    return batch * n * (rows + codes) + _ROOM


def free_bytes(device: torch.device) -> float:
    """Free memory of the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


class Cell:
    """Caches of `batch` sequences of n tokens with their codes, and all ways to attend to them.

    bfloat16: keys, values (batch, KV heads, n, D); q (batch, query heads, 1, D); key (batch,
    KV heads, 1, D), the newest token's.
    """

    def __init__(self, shape: Shape, batch: int, n: int, device: torch.device) -> None:
        self.shape, self.batch, self.n, self.device = shape, batch, n, device
        self.scaling = shape.head_dim**-0.5
        torch.manual_seed(0)
        size = (batch, shape.kv_heads, n, shape.head_dim)
        self.keys, self.values = (self._random(*size) for _ in "kv")
        self.q = self._random(batch, shape.query_heads, 1, shape.head_dim)
        self.key = self.keys[:, :, -1:].contiguous()
        layouts = {layout for layout, _ in VARIANTS.values()}
        self.maps = {layout: shape.maps(layout, 0).to(device) for layout in layouts}
        self.codes = {layout: self._encode(layout) for layout in layouts}

    def _random(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()

    def _encode(self, layout: Layout) -> Any:
        from hashattn_kernels.codes import Tiled

        store, maps = Tiled(), self.maps[layout]
        store.reserve(self.batch, maps.key.heads, self.shape.bits // 32, self.n, self.device)
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
            for name in VARIANTS:
                step = self.sparse(name, divisor)
                step(self.q, self.key)
                self.check(name, step)
                bytes_read = self._stage_bytes(name, step)
                stages = {"total": partial(step, self.q, self.key)}
                if divisor == divisors[0]:
                    stages |= {
                        "encode": partial(step.encode, self.q, self.key),
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

        layout, options = VARIANTS[name]
        maps = self.maps[layout]
        step = DecodeStep(
            maps.query, maps.key, self.keys, self.values, heavy=self.n // divisor, sink=SINK,
            local=LOCAL, scaling=self.scaling, **options,
        )  # fmt: skip
        step.codes = self.codes[layout]
        step.spans[..., 1] = self.n
        return step

    def check(self, name: str, step: Any) -> None:
        """RuntimeError unless lists and output of a step that ran are the reference's, on the first
        sequence; longer contexts than _CHECKED are not compared."""
        if self.n > _CHECKED:
            return
        layout = VARIANTS[name][0]
        _, lists, _, width = step.indices.shape
        query = encode(self.q[:1], self.maps[layout].query)
        codes = self.codes[layout].to_tokens()[:1]
        expected = select_by_codes(
            query, codes, step.heavy[:1], SINK, LOCAL, lists=lists, width=width,
            backend="reference",
        )  # fmt: skip
        if not torch.equal(step.indices[:1], expected):
            raise RuntimeError(f"{name}: lists differ from the reference's at {self.n} tokens")
        read = (step.indices if step.union is None else step.union)[:1]
        out = attend(self.q[:1], self.keys[:1], self.values[:1], read, self.scaling,
                     backend="reference")  # fmt: skip
        if not torch.allclose(step.out[:1].float(), out.float(), rtol=2e-2, atol=2e-2):
            raise RuntimeError(f"{name}: the output differs from the reference's")

    @property
    def _row_bytes(self) -> int:
        """K and V of a token."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.keys.element_size()

    def _stage_bytes(self, name: str, step: Any) -> dict[str, int]:
        """Bytes that each stage must read."""
        maps = self.maps[VARIANTS[name][0]]
        read = step.indices if step.union is None else step.union
        row = 2 * self.shape.head_dim * self.keys.element_size()
        sizes = {
            "encode": weight_bytes(maps),
            "select": self.batch * maps.key.heads * self.n * self.shape.bits // 8,
            "attend": int((read >= 0).sum()) * row,
        }
        return sizes | {"total": sum(sizes.values())}

    def _topk(self, divisor: int) -> Call:
        """torch's top-k of as many scores as one list per query head has."""
        scores = torch.randint(0, 33, (self.batch, self.shape.query_heads, self.n),
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
    for title, table in sections.items():
        print(f"\n{title}\n{table.round(3).to_string()}")
    for reason in record["not_measured"]:
        print("not measured:", reason)

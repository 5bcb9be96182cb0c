"""A step over a cache whose rows lie in a file: memory held, time with and without the page cache.

The lists that are read follow a recorded reuse (evaluation.measures: hits of a hot set), as random
keys and queries have none; what is timed is all of a layer's step: encoding, selection, finding and
fetching rows, attention. The step in memory is the package's own, one call of a kernel.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.attention.masks import make_plan
from hashattn.attention.memory import LayerMemory, Memory, Traffic
from hashattn.attention.offload import OffloadedRows
from hashattn.attention.stored import PlainRows
from hashattn.base.repository import repository
from hashattn.kernels import (
    attend,
    decode_step,
    dense_decode,
    encode,
    encode_graded,
    layout_for,
    read_rows,
    select_by_codes,
)
from hashattn.reproduce.bench.record import protocol_of, save
from hashattn.reproduce.bench.timing import measure, spread
from hashattn.reproduce.bench.ways import WAYS, Shape
from hashattn.reproduce.experiments.hot_set import NAME, RANKED

# tokens, layers, hot sets by share of the context
_GRID = ((2**18, 2, (1 / 8, 1 / 4, 1 / 2)), (2**20, 2, (1 / 4,)))
_DTYPE = torch.bfloat16
_BLOCK = 4096
_ON_DISK = 2**21, 20_000  # rows of a file, and how many of them are read alone
_SETTLING, _ROUNDS, _COLD_ROUNDS = 12, 15, 5


@dataclass(frozen=True)
class _Reuse:
    """How selections of n/32 tokens come back: the share that the step before read; hits of the
    rows read last, by their share of the context; rows of a KV head by those of one of its heads.
    """

    step_before: float
    hits: dict[float, float]
    union: float

    @classmethod
    def recorded(cls) -> _Reuse:
        """Of SmolLM2 at 8,192 tokens, the mean of its layers (notebook 04's record)."""
        path = repository() / "data" / "reference" / "smollm2" / f"{NAME}.csv"
        table = pd.read_csv(path)
        chosen = table.query(f"tokens == 8192 and reading == '{RANKED}' and fraction == 32")
        means = chosen.drop(columns="reading").mean()
        hits = {share: float(means[str(share)]) for share in (0.125, 0.25, 0.5)} | {1.0: 1.0}
        return cls(float(means["again"]), hits, float(means["union"]))


class _Trace:
    """Lists (1, query heads, 1, m) int32 of successive steps over n tokens."""

    def __init__(self, n: int, width: int, shape: Shape, reuse: _Reuse, seed: int = 0) -> None:
        self._n, self._width, self._shape, self._reuse = n, width, shape, reuse
        self._random = torch.Generator().manual_seed(seed)
        newest_first = torch.arange(n - 1, -1, -1, dtype=torch.int32)
        self._stacks = [newest_first.clone() for _ in range(shape.kv_heads)]

    def __next__(self) -> Tensor:
        rows = [self._head(head) for head in range(self._shape.kv_heads)]
        return torch.stack([line for head in rows for line in head])[None, :, None]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def _head(self, head: int) -> list[Tensor]:
        """Lists of the query heads of a KV head; moves what they read to the front of its stack."""
        stack = self._stacks[head]
        read = stack[self._depths(int(self._reuse.union * self._width))]
        kept = torch.ones(self._n, dtype=torch.bool)
        kept[read.long()] = False
        self._stacks[head] = torch.cat((read, stack[kept[stack.long()]]))
        group, lists = self._shape.group, []
        order = read[self._permutation(len(read))]
        for each in range(group):
            own, others = order[each::group], order[torch.arange(len(order)) % group != each]
            more = others[self._permutation(len(others))[: self._width - len(own)]]
            lists.append(torch.cat((own, more)).sort().values)
        return lists

    def _depths(self, count: int) -> Tensor:
        """Places in the stack, as many in each of its parts as the reuse says."""
        bounds = [(0, 0.0), (count, self._reuse.step_before)]
        bounds += [(int(share * self._n), hits) for share, hits in self._reuse.hits.items()]
        parts, taken = [], 0
        for (first, before), (last, hits) in zip(bounds, bounds[1:], strict=False):
            wanted = min(round(count * hits), count) - round(count * before)
            parts.append(first + self._permutation(last - first)[:wanted])
            taken += wanted
        return torch.cat(parts)

    def _permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._random)


class _Layer:
    """A layer's rows, in memory (`pairs`) or stored (`rows`), and its codes of all but the newest
    token."""

    def __init__(self, n: int, shape: Shape, memory: Memory | None, layers: int) -> None:
        way, generator = WAYS["default"], torch.Generator().manual_seed(0)
        self.maps, self.grades = way.maps(shape, 0), way.grades
        self.codes, self._shape = layout_for(torch.device("cpu"))(), shape
        self.pairs = self.rows = None
        self.format = PlainRows(shape.head_dim, _DTYPE)
        size = (1, shape.kv_heads, n, 2, shape.head_dim)
        if memory is None:
            self.pairs = torch.empty(size, dtype=_DTYPE)
        else:
            storage = LayerMemory(memory, layers)
            slots = storage.slots(shape.kv_heads, self.format.width)
            self.rows = OffloadedRows(storage, shape.kv_heads, slots, self.format.width, "cpu")
        for start in range(0, n, _BLOCK):
            part = torch.randn((*size[:2], _BLOCK, *size[3:]), generator=generator).to(_DTYPE)
            self.codes.append(encode(part[:, :, :, 0], self.maps.key))
            if memory is None:
                self.pairs[:, :, start : start + _BLOCK] = part
            else:
                self.rows.append(self.format.pack(*part.unbind(3)))
        self.newest = part[:, :, -1:]
        self.codes.crop(n - 1)

    @property
    def held(self) -> int:
        """Bytes of K, V and codes in memory, tables included."""
        kept = self.pairs.nbytes if self.rows is None else self.rows.nbytes
        return kept + self.codes.room.nbytes


def _held_by_process() -> int:
    """Bytes of memory that are this process's alone: no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class _Steps:
    """Steps of one layer: over memory, and over stored rows, reading the lists of a trace."""

    def __init__(self, n: int, shape: Shape, trace: _Trace, budget: Budget) -> None:
        self._n, self._shape, self._trace = n, shape, trace
        self._plan = make_plan(None, 1, 1, n, torch.device("cpu"), budget)
        generator = torch.Generator().manual_seed(1)
        size = (4, 1, shape.query_heads, 1, shape.head_dim)
        self._queries = torch.randn(size, generator=generator).to(_DTYPE)
        self._logits = {"scaling": shape.head_dim**-0.5}
        self.lists = next(trace)

    def query(self, number: int) -> Tensor:
        return self._queries[number % len(self._queries)]

    def in_memory(self, layer: _Layer, number: int, clock: Any) -> dict[str, float]:
        plan, start = self._plan, clock()
        decode_step(
            self.query(number), *layer.pairs.unbind(3), layer.codes, layer.maps.query,
            layer.maps.key, heavy=plan.heavy, spans=plan.spans, sink=plan.sink, local=plan.local,
            width=plan.width, lists=self._shape.query_heads, grades=layer.grades, **self._logits,
        )  # fmt: skip
        seconds = clock() - start
        layer.codes.crop(self._n - 1)
        return {"total": seconds}

    def dense(self, layer: _Layer, number: int) -> None:
        dense_decode(self.query(number), *layer.pairs.unbind(3), **self._logits)

    def stored(self, layer: _Layer, traffic: Traffic, number: int, clock: Any) -> dict[str, float]:
        self.lists = next(self._trace)
        query, plan, marks = self.query(number), self._plan, [clock()]
        layer.rows.crop(self._n - 1)  # the newest token comes with the step
        layer.rows.append(layer.format.pack(*layer.newest.unbind(3)))
        marks.append(clock())
        layer.codes.append(encode(layer.newest[:, :, :, 0], layer.maps.key))
        codes, _ = encode_graded(query, layer.maps.query, self._shape.query_heads, *layer.grades)
        select_by_codes(
            codes, layer.codes, plan.heavy, plan.sink, plan.local, spans=plan.spans,
            width=plan.width, most=layer.grades.most,
        )  # fmt: skip
        marks.append(clock())
        rows, slots = layer.rows.reach(self.lists, traffic)
        marks.append(clock())
        self.out = layer.format.attend(query, rows, slots, **self._logits)
        marks.append(clock())
        layer.codes.crop(self._n - 1)
        names = ("store", "select", "reach", "attend")
        stages = {k: b - a for k, a, b in zip(names, marks, marks[1:], strict=False)}
        return stages | {"total": marks[-1] - marks[0]}

    def check(self, memory: _Layer, number: int) -> None:
        """That the last stored step gave what attention in memory gives, bit for bit."""
        query = self.query(number)
        expected = attend(query, *memory.pairs.unbind(3), self.lists, **self._logits)
        if not torch.equal(self.out, expected):
            raise AssertionError("rows of the hot set are not those that were stored")


def bench(
    path: Path, grid: Sequence[tuple[int, int, Sequence[float]]] = _GRID, shape: Shape | None = None
) -> None:
    """Measure, write the record to `path` and print its tables; files lie in the system's folder
    for temporary ones (TMPDIR)."""
    shape, steps, kept = shape or Shape(), [], []
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for n, layers, shares in grid:
            timed, bytes_held = _context(n, layers, shares, shape, place)
            steps += timed
            kept += bytes_held
        disk = _disk(place, PlainRows(shape.head_dim, _DTYPE).width)
    recorded = _Reuse.recorded()
    reuse = vars(recorded) | {"hits": {str(k): v for k, v in recorded.hits.items()}}
    protocol = {"dtype": str(_DTYPE), "shape": vars(shape), "reuse": reuse}
    content = {"held": kept, "disk": disk, "steps": steps}
    save(path, protocol=protocol_of("wall", 0) | protocol, **content)
    print(table(steps).to_string(), held(kept).to_string(), disk, sep="\n\n")


def _context(
    n: int, layers: int, shares: Sequence[float], shape: Shape, place: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the record for n tokens: times, and bytes held."""
    rows, budget = [], Budget(sink=4, local=252, density=1 / 32)
    row_bytes = PlainRows(shape.head_dim, _DTYPE).width
    before = _held_by_process()
    memory = [_Layer(n, shape, None, layers) for _ in range(layers)]
    held = [{"tokens": n, "hot set": 1.0, "layers": layers, "process": _held_by_process() - before,
             "counted": sum(layer.held for layer in memory)}]  # fmt: skip
    steps = _Steps(n, shape, _Trace(n, n // 32 + 256, shape, _Reuse.recorded()), budget)
    for share in shares:
        fast = int(share * n) * layers * shape.kv_heads * row_bytes
        before = _held_by_process()
        stored = [_Layer(n, shape, Memory(fast_bytes=fast, folder=place), layers)
                  for _ in range(layers)]  # fmt: skip
        rows += [{"tokens": n} | row for row in _of_hot_set(steps, memory[0], stored[0], share)]
        held.append(held[0] | {"hot set": share, "process": _held_by_process() - before,
                               "counted": sum(layer.held for layer in stored)})  # fmt: skip
        del stored
    return rows, held


def _of_hot_set(
    steps: _Steps, memory: _Layer, stored: _Layer, share: float
) -> list[dict[str, Any]]:
    """Rows of the record: the step in memory, dense, and stored with and without a page cache."""
    for number in range(_SETTLING):
        steps.stored(stored, Traffic(), number, time.perf_counter)
    steps.check(memory, number)
    traffic = Traffic()
    timed = measure(
        {
            "memory": lambda number, clock: steps.in_memory(memory, number, clock),
            "page cache": lambda number, clock: steps.stored(stored, traffic, number, clock),
            "dense": lambda number, clock: steps.dense(memory, number),
        },
        _ROUNDS,
    )
    cold, cold_traffic = [], Traffic()
    for number in range(-1, _COLD_ROUNDS):
        stored.rows.forget_pages()
        if not number:
            cold_traffic = Traffic()
        cold.append(steps.stored(stored, cold_traffic, number, time.perf_counter))
    for stage in cold[0]:
        values = [each[stage] for each in cold[1:]]
        timed.append({"variant": "disk", "stage": stage} | spread(values))
    found = {"page cache": (traffic, _ROUNDS + 1), "disk": (cold_traffic, _COLD_ROUNDS)}
    for row in timed:
        row["hot set"] = share
        if row["variant"] in found:
            seen, count = found[row["variant"]]
            row["hit rate"] = seen.hit_rate
            row["bytes a step"] = seen.bytes_moved / count
    return timed


def _disk(place: str, width: int) -> dict[str, float]:
    """Microseconds of a row that is read alone, not in the page cache and in it, and bytes a second
    of a whole read."""
    count, rows = _ON_DISK
    file = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        block = torch.randint(256, (min(2**26, count * width),)).byte().numpy()
        for start in range(0, count * width, len(block)):
            os.pwrite(file, block, start)
        os.fsync(file)
        places = torch.randperm(count)[:rows].sort().values
        out, result = torch.empty(rows * width, dtype=torch.uint8), {}
        for name in ("disk", "page cache"):
            if name == "disk":
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            read_rows(file, width, places, out, torch.arange(rows) * width)
            result[f"us a row, {name}"] = (time.perf_counter() - start) / rows * 1e6
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for at in range(0, count * width, len(block)):
            os.preadv(file, [memoryview(block)], at)
        result["bytes a second"] = count * width / (time.perf_counter() - start)
        return result
    finally:
        os.close(file)


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each hot set and place of the rest: milliseconds, and how often those of the step
    in memory."""
    lines, totals = [], [row for row in rows if row["stage"] == "total"]
    base = {(row["tokens"], row["hot set"]): row["ms"]
            for row in totals if row["variant"] == "memory"}  # fmt: skip
    for row in totals:
        ratio = row["ms"] / base[row["tokens"], row["hot set"]]
        names = ("tokens", "hot set", "variant", "hit rate", "bytes a step", "ms", "q1", "q3")
        lines.append({name: row.get(name) for name in names} | {"times memory": ratio})
    return pd.DataFrame(lines).set_index(["tokens", "hot set", "variant"])


def held(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """GB of K, V and codes in memory, as counted and as the process grew, and the share of what
    everything in memory takes, by tokens and hot set."""
    table = pd.DataFrame(rows).set_index(["tokens", "hot set"])
    whole = table.xs(1.0, level="hot set")
    shown = {"layers": table["layers"]}
    for name in ("counted", "process"):
        shown[f"{name} GB"] = table[name] / 1e9
        shown[f"{name} / all"] = table[name].div(whole[name], level="tokens")
    return pd.DataFrame(shown)

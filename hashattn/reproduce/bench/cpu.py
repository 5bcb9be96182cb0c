"""`make bench`: the CPU's latency grid, threads, start-up, whole models, and llama.cpp beside ours;
one result file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hashattn.attention.budget import Budget
from hashattn.hashing.weights import HashWeights
from hashattn.kernels import available
from hashattn.reproduce.access import load_model
from hashattn.reproduce.bench import llamacpp, quality, tables
from hashattn.reproduce.bench.end_to_end import (
    LLAMA_1B,
    TWO_LAYERS_OF_8B,
    model_latency,
    random_llama,
)
from hashattn.reproduce.bench.layer import PEERS, layer_latency
from hashattn.reproduce.bench.policy import policy_latency, policy_table
from hashattn.reproduce.bench.receipts import receipt_cost
from hashattn.reproduce.bench.record import save
from hashattn.reproduce.bench.ways import Shape
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors.hash import HashSelector

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DTYPES = (torch.bfloat16, torch.float32)  # on several threads the first alone
SINK = LOCAL = 128  # the paper's
_FRACTION = 32  # n / 32 heavy tokens
MODEL_CONTEXTS = (32768, 131072)
_POLICY_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8000)  # of at most 8,192 positions
MODELS = {  # how to build it, tokens to decode, whether to measure on one thread as well
    "embedded": (lambda: load_model(load_profile("embedded"))[0], 8, False),
    "random Llama 1B": (lambda: random_llama(LLAMA_1B), 4, False),
    "two random layers of Llama 8B": (lambda: random_llama(TWO_LAYERS_OF_8B), 8, True),
}


def budget(n: int) -> Budget:
    """n / 32 heavy tokens beside 128 sink and 128 local ones."""
    return Budget(SINK, LOCAL, heavy=n // _FRACTION)


def bench(path: Path, contexts: tuple[int, ...] = CONTEXTS, models: bool = True) -> dict[str, Any]:
    """Measure everything, print the tables, write `path`; returns what was written.

    Variants of one length and dtype run interleaved in one process; one thread first, then torch's
    number of threads, in bfloat16 alone.
    """
    threads = torch.get_num_threads()
    rows, start = [], start_seconds() if available("numba") else None
    for number in sorted({1, threads}):
        torch.set_num_threads(number)
        for dtype in DTYPES if number == 1 else DTYPES[:1]:
            for n in contexts:
                peers = PEERS if number == 1 else ("roofline",)
                repeats = 15 if n <= 16384 else 9
                print(f"{number} thread(s), {dtype}, {n} tokens", flush=True)
                rows += layer_latency(n, dtype, budget(n), repeats=repeats, peers=peers)
    torch.set_num_threads(threads)
    beside, note = llamacpp.side_by_side() if models else ([], "")
    record = {
        "shape": asdict(Shape()),
        "layer": rows,
        "models": _whole_models() if models else [],
        "policy": policy() if models else [],
        "receipt": receipts() if models else None,
        "start": start,
        "llamacpp": beside,
        "llamacpp_note": note,
    }
    save(path, **record)
    report(record)
    print(f"\nwritten to {path}")
    return record


def _whole_models() -> list[dict[str, Any]]:
    """model_latency of the embedded model and of random ones of Llama's shapes."""
    rows, threads = [], torch.get_num_threads()
    for name, (build, steps, one_thread) in MODELS.items():
        model = build()
        for number in sorted({1, threads}) if one_thread else [threads]:
            torch.set_num_threads(number)
            for n in MODEL_CONTEXTS:
                print(f"{name}, {number} thread(s), {n} tokens", flush=True)
                rows += model_latency(name, model, n, budget(n), steps=steps)
    return rows


def policy(contexts: tuple[int, ...] = _POLICY_CONTEXTS) -> list[dict[str, Any]]:
    """policy_latency of the embedded model and the default method, 1/16 of the tokens read."""
    model = MODELS["embedded"][0]()
    selector = HashSelector(HashWeights.for_model(model).rounded())
    print("dense below the measured break-even", flush=True)
    return policy_latency("embedded", model, selector, Budget(density=1 / 16), contexts)


def receipts(n: int = 4096) -> dict[str, Any]:
    """receipt_cost of the embedded model."""
    model = MODELS["embedded"][0]()
    return receipt_cost(model, n, budget(n))


_FIRST_STEP = """
import time, torch
start = time.perf_counter()
import hashattn_kernels as kernels
def maps(heads, **more):
    weights = torch.randn(heads, 128, 32)
    return kernels.Maps((weights,), (torch.zeros(heads, 32),), **more).rounded()
q = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16)
k = torch.randn(1, 8, 600, 128, dtype=torch.bfloat16)
keys = maps(8, steps=torch.rand(8, 3, 32))
codes = kernels.layout_for(k.device).from_tokens(kernels.encode(k[:, :, :599], keys))
kernels.decode_step(q, k, k, codes, maps(32), keys, heavy=torch.full((1, 1, 1), 20),
                    spans=torch.tensor([[[0, 600]]]), sink=4, local=28, width=52, lists=32,
                    scaling=0.1, grades=kernels.Grades(5, 255))
print(time.perf_counter() - start)
"""


def start_seconds() -> dict[str, float]:
    """Seconds from importing the kernels to the end of the first step: "cold" compiles them, "warm"
    loads them from the disk."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = os.environ | {"XDG_CACHE_HOME": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        settings.pop("NUMBA_CACHE_DIR", None)
        for name in ("cold", "warm"):
            process = subprocess.run(
                [sys.executable, "-c", _FIRST_STEP],
                env=settings, capture_output=True, text=True, check=True,
            )  # fmt: skip
            seconds[name] = float(json.loads(process.stdout))
    return seconds


def report(record: dict[str, Any]) -> None:
    """Print a record's tables."""
    rows = record["layer"]
    sections = {
        "milliseconds a step, all variants": tables.totals(rows),
        "speed-up over torch's fastest dense call and over our dense step": tables.speedups(rows),
        "what a step costs at any length": tables.fixed_costs(rows),
        "break-even length, as measured": tables.break_even(rows),
        f"speed at equal quality, bfloat16 on one thread; {quality.PROTOCOL}": tables.equal_quality(
            rows, quality.stored()
        ),
        "share of the roofline": tables.roofline(rows),
        "the default's stages": tables.stages(rows),
        "selection": tables.selection([row for row in rows if row["threads"] == 1]),
        "threads": tables.scaling(rows),
    }
    if record["models"]:
        sections["whole models"] = tables.models(record["models"])
        sections["attention in a token: kernels, and host"] = tables.model_host(record["models"])
    if record.get("policy"):
        sections["dense below the break-even: over the model's own step"] = policy_table(
            record["policy"]
        )
    for title, table in sections.items():
        if table is not None and len(table):
            print(f"\n{title}\n{table.round(3).to_string()}")
    if record.get("receipt"):
        cost = record["receipt"]
        print(
            f"\nthe receipt: {cost['receipt_us']:.0f} us a token, {cost['receipt_share']:.2%} of "
            f"its time; with all listeners {cost['everything_us']:.0f} us, "
            f"{cost['everything_share']:.2%}"
        )
    if record["start"]:
        print("\nseconds to the first step:", record["start"])
    if record["llamacpp_note"]:
        llamacpp.report(record["llamacpp"], record["llamacpp_note"])

"""Compile the kernels that the notebooks use."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from hashattn_kernels import (
    Coins,
    Grades,
    HotSet,
    Maps,
    RowFormat,
    Rule,
    attend,
    attend_rows,
    decode_step,
    dense_decode,
    encode,
    encode_graded,
    encode_pair,
    grade_bits,
    layout_for,
    quantise,
    sample,
    sample_by_codes,
    select,
    select_by_codes,
    verified_step,
)

from ..rule import TERMS
from .roofline import gather, read

EMBEDDED, LLAMA = 64, 128  # head dims: of the embedded model, of the latency figures


def main() -> None:
    """Call every kernel once with small tensors of the notebooks' head dims and dtypes, a process
    for each kind: the compiler uses one core."""
    start = time.perf_counter()
    kinds = ((EMBEDDED, torch.float32), (LLAMA, torch.float32), (LLAMA, torch.bfloat16))
    calls = [partial(_attention, *kind) for kind in kinds] + [_codes, _rows]
    processes = min(len(calls), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for call in [pool.submit(_without_gradients, call) for call in calls]:
            call.result()
    print(f"CPU kernels are ready ({time.perf_counter() - start:.1f} s)")


def _without_gradients(call: Callable[[], None]) -> None:
    with torch.no_grad():
        call()


def _attention(dim: int, dtype: torch.dtype) -> None:
    pairs = torch.randn(1, 2, 64, 2, dim).to(dtype)  # K and V of a token side by side
    (keys, values), queries = pairs.unbind(3), torch.randn(1, 4, 1, dim).to(dtype)
    dense_decode(queries, keys, values, 1.0)
    for lists in (2, 4):
        indices = torch.arange(8, dtype=torch.int32).expand(1, lists, 1, 8)
        attend(queries, keys, values, indices, 1.0)
        attend(queries, keys, values, indices, 1.0, log_weights=torch.zeros(1, lists, 1, 8))
    for precision in ("float32", "bfloat16"):
        maps = Maps((torch.randn(2, dim, 32),), (torch.zeros(2, 32),))
        maps = maps.rounded() if precision == "bfloat16" else maps
        encode_pair(queries[:, :2], maps, keys[:, :, :1], maps)
        encode(keys, maps)
        encode_graded(queries[:, :2], maps, 2)
    maps, key_maps = (Maps((torch.randn(h, dim, 32),), (torch.zeros(h, 32),)) for h in (4, 2))
    for lists in (2, 4):
        before = encode(keys[:, :, :-1], key_maps.rounded())
        given = {
            "heavy": torch.ones(1, 1, 1, dtype=torch.int64), "spans": torch.tensor([[[0, 64]]]),
            "sink": 1, "local": 1, "lists": lists, "scaling": 1.0, "grades": Grades(5, 255),
        }  # fmt: skip
        layer = maps.rounded(), key_maps.rounded()
        codes = layout_for(keys.device).from_tokens(before)
        decode_step(queries, keys, values, codes, *layer, width=3, **given)
        if dim == EMBEDDED:
            rule = Rule(torch.zeros(4, 1, TERMS), torch.zeros(lists, dtype=torch.int64), 0.0)
            codes = layout_for(keys.device).from_tokens(before)
            verified_step(queries, keys, values, codes, *layer, rule=rule, **given)
    read(pairs)
    gather(pairs, torch.zeros(2, dtype=torch.int64).numpy(), 256)


def _rows() -> None:
    pairs, queries = torch.randn(2, 1, 2, 64, EMBEDDED), torch.randn(1, 4, 1, EMBEDDED)
    for bits in (8, 4):
        quantise(*pairs.bfloat16(), bits)
        rows = quantise(*pairs, bits)
        row_format = RowFormat(bits, EMBEDDED, EMBEDDED, torch.float32)
        for lists in (2, 4):
            indices = torch.arange(8, dtype=torch.int32).expand(1, lists, 1, 8)
            attend_rows(queries, rows, row_format, indices, 1.0)
    HotSet(2, 4).place(torch.zeros(2, 4, dtype=torch.int32))


def _codes() -> None:
    for group in (4, 16):  # distances in bytes, and in two bytes
        queries, keys = (torch.zeros(1, n, 40, 1, dtype=torch.int32) for n in (2 * group, 2))
        select_by_codes(queries[:, :, :1], keys, 4, 1, 1)
        graded = torch.zeros(1, group, 1, 1 if group == 4 else 4, 6, dtype=torch.int32)
        most = 255 if group == 4 else 1023
        keys = keys.expand(1, 2, 40, graded.shape[3])
        select_by_codes(graded, keys, 4, 1, 1, most=most)
        units = torch.ones(1, group, 1, dtype=torch.int64)
        sample_by_codes(graded, keys, units, 2, 2, 0.1, Coins(), 1, 1, most=most)
    grade_bits(torch.ones(1, 1, 1, 32))
    candidates = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    for dtype in (torch.int32, torch.int64):  # distances, and the order of random tokens
        for highest in (9, 999):
            scores = torch.arange(40, dtype=dtype).expand(1, 2, 1, 40) * highest // 39
            select(scores, 4, candidates, ~candidates)
    select(scores.float(), 4, candidates, ~candidates)
    coins = torch.zeros(1, 2, 1, 40, dtype=torch.int32)
    sample(scores, 4, 4, 0.1, coins, candidates, ~candidates)

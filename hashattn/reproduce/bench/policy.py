"""The policy that never loses, measured: decoding with attach(dense_below=break_even) beside the
model's own, from lengths where it stays dense to lengths where it is sparse."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedModel

from hashattn.attention.attachment import attach, measure_break_even
from hashattn.attention.break_even import BreakEven
from hashattn.attention.budget import Budget
from hashattn.reproduce.bench.end_to_end import filled_cache
from hashattn.reproduce.bench.record import protocol_of
from hashattn.reproduce.bench.timing import spread
from hashattn.selectors.base import Selector

_WARM = 2  # steps of a round that are not counted: the first sparse one encodes the cache
_WAYS = ("own", "policy")


@torch.no_grad()
def policy_latency(
    name: str, model: PreTrainedModel, selector: Selector, budget: Budget, lengths: Sequence[int],
    rounds: int = 5, steps: int = 6, seed: int = 0, even: BreakEven | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Milliseconds of a token with each of `lengths` cached ones: a row for the model's own step
    ("own": its attention and cache, nothing attached) and one for the policy's.

    Both decode in turn, `steps` tokens in each of `rounds`. Columns ms (median), q1, q3; of the
    policy's rows dense_below (tokens, None for any length), and sparse: whether its steps were; and
    the protocol. even: measured before, else it is measured here.
    """
    even = (
        measure_break_even(model, selector, budget, allow_untrained=True) if even is None else even
    )
    below = None if even.tokens == math.inf else even.tokens
    protocol = protocol_of("wall", seed) | {
        "model": name, "dtype": str(model.dtype).removeprefix("torch."), "rounds": rounds,
        "steps": steps, "density_asked": budget.density, "method": selector.record(),
    }  # fmt: skip
    rows = []
    for n in lengths:
        filled = filled_cache(model, n, seed)
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        sparse = False
        for _ in range(rounds):
            seconds["own"] += _decoded(model, copy.deepcopy(filled), steps)
            with attach(
                model, selector, budget, dense_below=even, allow_untrained=True, allow_dense=True
            ) as attached:
                seconds["policy"] += _decoded(model, copy.deepcopy(filled), steps)
            sparse = sparse or attached.receipt.sparse_calls > 0
        told = {"own": {}, "policy": {"dense_below": below, "sparse": sparse}}
        rows += [
            {"variant": way, "n": n} | spread(seconds[way]) | told[way] | protocol for way in _WAYS
        ]
    return rows


def policy_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The policy's speed-up over the model's own step: a line per (model, threads, n), columns own
    ms, policy ms, speed-up, the step ("dense" or "sparse") and dense_below (infinite: any)."""
    frame = pd.DataFrame(rows).set_index(["model", "threads", "n"])
    own, policy = (frame[frame["variant"] == way] for way in _WAYS)
    table = pd.DataFrame({"own ms": own["ms"], "policy ms": policy["ms"]})
    table["speed-up"] = own["ms"] / policy["ms"]
    table["step"] = policy["sparse"].map({True: "sparse", False: "dense"})
    table["dense below"] = policy["dense_below"].astype(float).fillna(math.inf)
    return table


def _decoded(model: PreTrainedModel, cache: DynamicCache, steps: int) -> list[float]:
    """Seconds of `steps` tokens after _WARM."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else nullcontext
    seconds = []
    for _ in range(_WARM + steps):
        wait()
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds[_WARM:]

"""How long a decoding step takes on this machine, dense and at each budget.

At each budget by the policy that never loses: dense below the break-even measured here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from hashattn.attention.attachment import attach, measure_break_even
from hashattn.attention.break_even import BreakEven
from hashattn.base.environment import device_name
from hashattn.evaluation.answering import PrefilledContext, feed
from hashattn.evaluation.methods import Method

_ROUNDS = 5
_STEPS = 4  # of a round and method, after those that encode the cached keys
_WARM = 2


@torch.no_grad()
def step_times(model: Any, tokens: Sequence[int], methods: Sequence[Method]) -> dict[str, Any]:
    """Milliseconds of one-token steps after `tokens`, the methods in turn, dense first.

    {"context", "device", "steps" of each, "prefill_seconds", "dense_ms", "budgets": [{"budget",
    "ms", "speedup", "dense_below"}]}; ms: {"median", "low", "high"}, the ends those of the middle
    80 %; dense attention is the one that the model was loaded with. dense_below: the measured
    break-even, None where no length is enough; a method's step with fewer tokens is a dense one of
    its attachment.
    """
    context = PrefilledContext(model, tokens)
    evens = [_break_even(model, method) for method in methods]
    taken: list[list[float]] = [[] for _ in methods]
    for _ in range(_ROUNDS):
        for own, method, even in zip(taken, methods, evens, strict=True):
            own += _steps(model, context, method, even)
    dense, *sparse = (_spread(own) for own in taken)
    budgets = [
        {"budget": method.budget.density, "ms": ms, "speedup": dense["median"] / ms["median"],
         "dense_below": None if even.tokens == math.inf else even.tokens}
        for method, ms, even in zip(methods[1:], sparse, evens[1:], strict=True)
    ]  # fmt: skip
    return {"context": len(tokens), "device": device_name(), "steps": _ROUNDS * _STEPS,
            "prefill_seconds": context.seconds, "dense_ms": dense, "budgets": budgets}  # fmt: skip


def _break_even(model: Any, method: Method) -> BreakEven | None:
    return measure_break_even(model, method.selector, method.budget) if method.sparse else None


def _steps(
    model: Any, context: PrefilledContext, method: Method, even: BreakEven | None
) -> list[float]:
    attached = nullcontext()
    if method.sparse:
        attached = attach(
            model, method.selector, method.budget, allow_dense=method.allow_dense, dense_below=even
        )
    cache, token, times = context.fork(), context.tokens[-1], []
    with attached:
        for _ in range(_WARM + _STEPS):
            _wait(model)
            start = time.perf_counter()
            token = feed(model, [token], cache)
            times.append(1000 * (time.perf_counter() - start))
    return times[_WARM:]


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(times, [0.1, 0.5, 0.9])
    return {"median": float(median), "low": float(low), "high": float(high)}

"""What the receipt costs: the share of a token's time spent counting and listening."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.attention.observer import Clock, LayerStep
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.bench.end_to_end import AttentionTimes, filled_cache
from hashattn.reproduce.bench.record import protocol_of
from hashattn.selectors.hash import HashSelector

_KEPT = 1000  # recent steps that the receipt of "everything" keeps


class _LastSteps:
    """Keeps each layer's last step, to count it again."""

    timed = False

    def __init__(self) -> None:
        self.of_layer: dict[int, LayerStep] = {}

    def saw(self, step: LayerStep) -> None:
        self.of_layer[step.layer] = step


@torch.no_grad()
def receipt_cost(
    model: PreTrainedModel, n: int, budget: Budget, steps: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Microseconds per token of counting alone and of every listener, and their shares of a token.

    The default method decodes `steps` tokens after n cached ones; then the calls of one token are
    counted again by a receipt ("receipt"), and by one that keeps its last steps, with a clock and a
    listener for the times ("everything"). Shares are of the median token, receipt included.
    """
    selector = HashSelector(HashWeights.for_model(model, seed=seed).rounded())
    cache, token = filled_cache(model, n, seed), torch.zeros(1, 1, dtype=torch.long)
    token_seconds = []
    with (
        attach(model, selector, budget, allow_dense=True, allow_untrained=True) as attached,
        attached.listen(_LastSteps()) as last,
    ):
        for _ in range(steps + 1):
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            token_seconds.append(time.perf_counter() - start)
    calls = list(last.of_layer.values())
    plain, full, times = attached.receipt.fresh(), attached.receipt.fresh(), AttentionTimes()
    full.keep_steps = _KEPT

    def count() -> None:
        for call in calls:
            plain.saw(call)

    def everything() -> None:
        for call in calls:
            clock = Clock(call.query.device)
            clock.lap("step")
            timed = LayerStep(call.layer, call.query, call.n, call.seen, None, call.indices,
                              None, call.plan, call.view, seconds=clock.seconds())  # fmt: skip
            full.saw(timed)
            times.saw(timed)

    whole = median(token_seconds[1:])
    costs = {"receipt": _seconds(count), "everything": _seconds(everything)}
    return {
        "n": n, "token_ms": whole * 1e3,
        **{f"{name}_us": seconds * 1e6 for name, seconds in costs.items()},
        **{f"{name}_share": seconds / whole for name, seconds in costs.items()},
        **protocol_of("wall", seed), "steps": steps, "layers": len(calls),
    }  # fmt: skip


def _seconds(call: Any, repeats: int = 200) -> float:
    """Median seconds of a call."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return median(spent)

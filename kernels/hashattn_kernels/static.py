"""A decode step over a static cache as one operator, which torch.compile and CUDA graphs hold.

How many tokens there are is a tensor on the device; codes have room for all that the cache can
hold. What never changes of a layer's steps is registered once and named by a number, so that a
graph need not know of maps and settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .backends import backend_for
from .codes import layout_for
from .coins import Coins
from .maps import Maps
from .step import Drawing, Grades, decode_step


@dataclass(frozen=True, eq=False)
class StaticStep:
    """What of a layer's steps stays: arguments of `decode_step`. slopes, trust, coins: of a
    drawing. memory: of launches, which layers whose steps follow one another share; graphs that
    captured a step need it as long as they live."""

    query_maps: Maps
    key_maps: Maps
    lists: int
    sink: int
    local: int
    width: int
    scaling: float
    grades: Grades | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    trust: float = 1.0
    coins: Coins | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)


_STEPS: WeakValueDictionary[int, StaticStep] = WeakValueDictionary()
_NUMBERS = count()


def register_step(step: StaticStep) -> int:
    """The number by which `static_step` knows these settings, while somebody holds them."""
    number = next(_NUMBERS)
    _STEPS[number] = step
    return number


def reserve_step(step: StaticStep, q: Tensor, k: Tensor, v: Tensor, room: Tensor) -> None:
    """Make what the steps of these settings keep on the device, before a graph captures one.

    q (B, Hq, rows, D), k, v and room: as of `static_step`.
    """
    reserve = getattr(backend_for(q, None, "decode_step", q, k, v), "reserve_step", None)
    if reserve is not None:
        reserve(
            q[:, :, :1], v, room, step.query_maps, step.key_maps, step.lists, step.width,
            step.grades, step.slopes is not None, step.memory,
        )  # fmt: skip


def static_step(
    q: Tensor, k: Tensor, v: Tensor, room: Tensor, counters: Tensor, length: Tensor,
    spans: Tensor, heavy: Tensor, drawn: Tensor | None, sinks: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    """Output (B, Hq, 1, Dv) of a step of the settings `number`; shapes as of `decode_step`.

    k, v: a static cache's, with the newest token in them; room: of the codes (`Codes.room`), to
    which its code is written; length () int64: tokens cached, on the device; counters: those of
    `new_counters`; drawn: which part of heavy is drawn.
    """
    take = _operator if torch.compiler.is_compiling() else _run
    return take(q, k, v, room, counters, length, spans, heavy, drawn, sinks, number)


@torch.no_grad()
def _run(
    q: Tensor, k: Tensor, v: Tensor, room: Tensor, counters: Tensor, length: Tensor,
    spans: Tensor, heavy: Tensor, drawn: Tensor | None, sinks: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    step, layout = _STEPS[number], layout_for(q.device)
    drawing = None if drawn is None else Drawing(step.slopes, drawn, step.trust, step.coins)
    options = dict(
        heavy=heavy, spans=spans, sink=step.sink, local=step.local, width=step.width,
        lists=step.lists, scaling=step.scaling, grades=step.grades, drawing=drawing,
        softcap=step.softcap, sinks=sinks, counters=counters,
    )  # fmt: skip
    module, maps = backend_for(q, None, "decode_step", q, k, v), (step.query_maps, step.key_maps)
    if getattr(module, "COUNTS_STEPS", False):  # it reads the length where it lies
        codes = layout.over(room, k.shape[2])
        result = module.decode_step(
            q, k, v, codes, *maps, length=length, memory=step.memory, **options
        )
        if result is not None:
            return result[0]
    codes = layout.over(room, int(length) - 1)
    return decode_step(q, k, v, codes, *maps, **options)[0]


@torch.library.custom_op("hashattn::static_step", mutates_args=("room", "counters"))
def _operator(
    q: Tensor, k: Tensor, v: Tensor, room: Tensor, counters: Tensor, length: Tensor,
    spans: Tensor, heavy: Tensor, drawn: Tensor | None, sinks: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    return _run(q, k, v, room, counters, length, spans, heavy, drawn, sinks, number)


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, room: Tensor, counters: Tensor, length: Tensor,
    spans: Tensor, heavy: Tensor, drawn: Tensor | None, sinks: Tensor | None, number: int,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])

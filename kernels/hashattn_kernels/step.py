"""A decode step of one layer: from the newest token's query and key to the layer's output.

Encoding, selection and attention in one call, so that a backend may run them as one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .api import attend, encode, encode_graded, sample_by_codes, select_by_codes
from .backends import backend_for
from .codes import Codes
from .coins import NAT, Coins
from .counters import count_step
from .maps import Maps
from .reference import NON_FINITE
from .rule import TERMS, Rule


class Grades(NamedTuple):
    """Of a query's code: see `grade_bits`."""

    planes: int
    most: int


class Drawing(NamedTuple):
    """How a step draws tokens: `sample_by_codes`, with slopes (lists,) float32, nats of attention
    logit for a unit of graded score. Of lists that grow (`verified_step`) drawn (lists,) float64 is
    which part of the heavy tokens is drawn, from 0 to 1."""

    slopes: Tensor
    drawn: Tensor
    trust: float
    coins: Coins


def units_of(steps: Tensor, slopes: Tensor) -> Tensor:
    """What a unit of weight costs in 1 / NAT nats, int64 (B, lists, q), at least 1.

    steps (B, lists, q) float32 of `encode_graded`: a bit that differs turns the sign of its
    pre-activation, so that a unit stands for twice the step.
    """
    units = NAT * (2 * steps) * slopes.to(steps.device)[:, None]
    return units.round().long().clamp(min=1)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Codes,
    query_maps: Maps,
    key_maps: Maps,
    *,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    width: int,
    lists: int,
    scaling: float,
    grades: Grades | None = None,
    drawing: Drawing | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counters: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the newest key's code, choose tokens by their codes, attend to them.

    q (B, Hq, 1, D), k (B, Hkv, n or more, D), v (B, Hkv, n or more, Dv): with the newest token, the
    n-th; codes: of the n - 1 tokens before, n afterwards. heavy (B, 1 or lists, 1) and spans
    (B, 1, 2) int64, sink, local, width: as of `select_by_codes`. grades: queries are graded; None:
    bits are counted. drawing: a part of heavy is drawn. counters: the step is added to these
    (`new_counters`), without waiting for a GPU.

    Returns the output (B, Hq, 1, Dv), the tokens read (B, lists, 1, width) int32, -1 for padding,
    and their log weights or None: what `encode`, `encode_graded`, `select_by_codes` or
    `sample_by_codes`, and `attend` give one after the other, bit for bit. ValueError for a query of
    several rows, a drawing without grades, and as of these; FloatingPointError where, in main
    memory, the newest token's key or value is not finite.
    """
    _check_rows(q)
    _check_drawing(grades, drawing, lists)
    _check(q, k, codes, heavy, spans, lists)
    arguments = {
        "heavy": heavy, "spans": spans, "sink": sink, "local": local, "width": width,
        "lists": lists, "scaling": scaling, "grades": grades, "drawing": drawing,
        "softcap": softcap, "sinks": sinks,
    }  # fmt: skip
    module = backend_for(q, backend, "decode_step", q, k, v)
    counts = counters is not None
    if counts and getattr(module, "COUNTS_STEPS", False):
        arguments["counters"], counts = counters, False
    fused, result = getattr(module, "decode_step", None), None
    if fused is not None:
        result = fused(q, k, v, codes, query_maps, key_maps, **arguments)
    if result is None:
        arguments.pop("counters", None)
        counts = counters is not None
        result = composed(q, k, v, codes, query_maps, key_maps, backend=backend, **arguments)
    if counts:
        n = codes.length
        count_step(counters, spans, result[1], n, k[:, :, n - 1 : n], v[:, :, n - 1 : n])
    return result


def verified_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Codes,
    query_maps: Maps,
    key_maps: Maps,
    *,
    rule: Rule,
    heavy: Tensor,
    spans: Tensor,
    sink: int,
    local: int,
    lists: int,
    scaling: float,
    grades: Grades | None = None,
    drawing: Drawing | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
    """`decode_step` with lists that double their heavy tokens (at least LEAST_HEAVY) by a rule.

    The rule's statistics, within LOG_LIMIT, are of what a list has read. Ranked, the tokens that it
    read last are the lower half of its heavy ones by score: edge, tokens not read x mean weight of
    that half / weight of all that was read; and change, |o - o'| / |o| of the output o' without it.
    With a part drawn: bar, the error that the sample itself estimates / |o| (Horvitz and Thompson's
    estimate of the variance: hashattn.attention.error_bars); and the part of the weight that drawn
    tokens have.

    Returns the output (B, Hq, 1, Dv), the tokens read (B, lists, 1, m) int32, -1 for padding, their
    log weights or None, and the levels that lists ended at (B, lists, 1) int64; None, with nothing
    appended, where no backend runs it in one call. Errors as of `decode_step`.
    """
    _check_rows(q)
    _check_drawing(grades, drawing, lists)
    _check(q, k, codes, heavy, spans, lists)
    rule_of = [
        ("rule.coefficients", rule.coefficients, torch.float32, (q.shape[1], None, TERMS)),
        ("rule.start", rule.start, torch.int64, (lists,)),
    ]
    if drawing is not None:
        rule_of.append(("drawing.drawn", drawing.drawn, torch.float64, (lists,)))
    for name, numbers, dtype, shape in rule_of:
        _check_numbers(name, numbers, dtype, shape)
    fused = getattr(backend_for(q, backend, "decode_step", q, k, v), "verified_step", None)
    if fused is None:
        return None
    return fused(
        q, k, v, codes, query_maps, key_maps, rule=rule, heavy=heavy, spans=spans, sink=sink,
        local=local, lists=lists, scaling=scaling, grades=grades, drawing=drawing, softcap=softcap,
        sinks=sinks,
    )  # fmt: skip


@torch.no_grad()
def composed(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, query_maps: Maps, key_maps: Maps,
    *, heavy: Tensor, spans: Tensor, sink: int, local: int, width: int, lists: int, scaling: float,
    grades: Grades | None = None, drawing: Drawing | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`decode_step` by its parts, each by the backend that runs it fastest."""
    newest, value = (part[:, :, codes.length : codes.length + 1] for part in (k, v))
    if k.is_cpu and not (bool(newest.isfinite().all()) and bool(value.isfinite().all())):
        raise FloatingPointError(NON_FINITE)
    codes.append(encode(newest, key_maps, backend=backend))
    if grades is None:
        query_codes, steps = encode(q, query_maps, backend=backend), None
    else:
        query_codes, steps = encode_graded(q, query_maps, lists, *grades, backend=backend)
    most = None if grades is None else grades.most
    if drawing is None:
        log_weights = None
        indices = select_by_codes(
            query_codes, codes, heavy, sink, local, spans=spans, lists=lists, width=width,
            most=most, backend=backend,
        )  # fmt: skip
    else:
        slopes, drawn, trust, coins = drawing
        drawn = drawn.expand(steps.shape)
        indices, log_weights = sample_by_codes(
            query_codes, codes, units_of(steps, slopes), heavy - drawn, drawn, trust, coins,
            sink, local, spans=spans, width=width, most=most, backend=backend,
        )  # fmt: skip
    out = attend(
        q, k, v, indices, scaling, softcap, sinks, log_weights=log_weights, backend=backend
    )
    return out, indices, log_weights


def _check_rows(q: Tensor) -> None:
    if q.shape[2] != 1:
        raise ValueError(
            f"q has {q.shape[2]} rows: a step has one; encode_graded, select_by_codes and attend "
            "take several"
        )


def _check_drawing(grades: Grades | None, drawing: Drawing | None, lists: int) -> None:
    if drawing is None:
        return
    if grades is None:
        raise ValueError("drawing needs graded queries: pass grades")
    _check_numbers("drawing.slopes", drawing.slopes, torch.float32, (lists,))


def _check_numbers(
    name: str, numbers: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """ValueError unless they have a shape, in which None stands for any size, in one piece."""
    fits = numbers.dim() == len(shape)
    fits = fits and all(b in (None, a) for a, b in zip(numbers.shape, shape, strict=True))
    if not fits or numbers.dtype != dtype or not numbers.is_contiguous():
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: expected contiguous {dtype} ({wanted}{',' * (len(shape) == 1)}), got "
            f"{numbers.dtype} {tuple(numbers.shape)}"
        )


def _check(
    q: Tensor, k: Tensor, codes: Codes, heavy: Tensor, spans: Tensor, lists: int
) -> None:  # fmt: skip
    """ValueError for what one region would take for addresses and sizes."""
    batch = q.shape[0]
    for name, numbers, shapes in (
        ("heavy", heavy, ((batch, 1, 1), (batch, lists, 1))),
        ("spans", spans, ((batch, 1, 2),)),
    ):
        if numbers.dtype != torch.int64 or numbers.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name}: expected int64 {wanted}, got {numbers.dtype} {tuple(numbers.shape)}"
            )
    if k.shape[2] <= codes.length:
        raise ValueError(
            f"k holds {k.shape[2]} tokens and codes {codes.length}: the newest token's key must "
            "be in k, and its code not yet among the codes"
        )

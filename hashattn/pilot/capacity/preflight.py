"""Is a pilot worth it? A verdict from a model, a workload and a device, with its reasons.

The verdict follows the predicted speed-up of a whole decode step at the budget, one that would lose
staying dense (attach's dense_below): "worth" from 1.5x,
"marginal" from 1.1x, else "no". Both limits are a convention: below 1.1x a gain drowns in what
varies from day to day, and of one below 1.5x much may go to what is not counted (launches, host,
computing). Where nothing was measured and less is gained than the host's estimated time, "worth"
becomes "marginal". A context beyond the model's positions is a "no" whatever the speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hashattn.pilot.capacity.devices import DEVICES, Device
from hashattn.pilot.capacity.hot_memory import HotMemory, holdings
from hashattn.pilot.capacity.machine import Measurement
from hashattn.pilot.capacity.result import (
    MARGINAL,
    NO,
    VERDICTS,
    WORTH,
    Cost,
    Figure,
    Note,
    Preflight,
    Workload,
)
from hashattn.pilot.capacity.shapes import ModelShape
from hashattn.pilot.capacity.speed import USABLE, Speed, least
from hashattn.pilot.settings import QUESTIONS

LEAST = {WORTH: 1.5, MARGINAL: 1.1}  # predicted speed-up
# Microseconds of host time of a sparse layer on a GPU, where `generate` launches its kernels one by
# one: 5 of Triton at 10 to 20 and some 60 of torch at 4 to 6. An estimate, not a measurement.
HOST_US = 300.0
_LONGEST = 1 << 27  # tokens: contexts beyond are not asked for
_MOST_BATCH = 1024
_ROUND = 1024  # contexts that would change a verdict are rounded up to multiples
_QUANTISED = 4  # bits of weights that are offered as a change


def preflight(
    model: ModelShape, workload: Workload, device: Device, *, budget: float = 1 / 16,
    bits: int = 64, lists: str = "per_query_head", measured: Measurement | None = None,
    fixed_us: float | None = None,
) -> Preflight:  # fmt: skip
    """Judge a pilot. See Speed for budget and all that follows, and for what is raised."""
    speed = Speed(model, device, budget, bits, lists, measured, fixed_us)
    context, batch = workload.context, workload.batch
    verdict = _verdict(speed, context, batch)
    return Preflight(
        verdict=verdict, model=model.name, device=device.label, workload=workload,
        budget=float(budget), bits=bits, lists=lists, share=speed.share(context, batch),
        ceiling=speed.ceiling(context, batch), speedup=speed.speedup(context, batch),
        devices=speed.devices(context, batch), reasons=tuple(_reasons(speed, workload, verdict)),
        changes=tuple(_changes(speed, workload, verdict)), lines=tuple(_lines(speed, workload)),
        memory=tuple(holdings(model, device, bits, context, batch)),
        cost=_cost(speed, workload), measured=measured,
    )  # fmt: skip


def _verdict(speed: Speed, context: int, batch: int) -> str:
    if _beyond(speed.model, context):
        return NO
    return _by_speed(speed, context, batch)


def _by_speed(speed: Speed, context: int, batch: int) -> str:
    """The verdict on a context that the model can read."""
    speedup = speed.speedup(context, batch)
    verdict = next((name for name, minimum in LEAST.items() if speedup >= minimum), NO)
    return MARGINAL if verdict == WORTH and _host_bound(speed, context, batch) else verdict


def _host_bound(speed: Speed, context: int, batch: int) -> bool:
    """Whether the host's estimated time takes all that is gained; unknown where it is measured."""
    guessed = speed.measured is None and speed.fixed_us is None
    return guessed and speed.spare_us(context, batch) < HOST_US


def _beyond(model: ModelShape, context: int) -> bool:
    return model.positions is not None and context > model.positions


def _reasons(speed: Speed, workload: Workload, verdict: str) -> list[Note]:
    """What decided first, then what the figures rest on, then memory."""
    model, context, batch = speed.model, workload.context, workload.batch
    share, ceiling = speed.share(context, batch), speed.ceiling(context, batch)
    notes = []
    if _beyond(model, context):
        limits = {"context": context, "positions": model.positions}
        notes.append(Note("beyond_positions", limits))
    where = {"share": share, "ceiling": ceiling, "context": context, "batch": batch}
    gain = {"speedup": speed.speedup(context, batch), "budget": float(speed.budget)}
    if ceiling < LEAST[MARGINAL]:
        notes.append(Note("attention_is_small", where))
    else:
        sparse = speed.sparse_speedup(context, batch)
        if sparse < 1:
            notes.append(Note("slower", where | gain | {"sparse": sparse}))
        else:
            key = {WORTH: "much_gained", MARGINAL: "some_gained", NO: "little_gained"}
            notes.append(Note(key[_by_speed(speed, context, batch)], where | gain))
    if speed.sparse_speedup(context, batch) < 1:
        even = _even(speed, batch)
        notes.append(Note("never_sparse", {}) if even is None
                     else Note("dense_below", {"tokens": even}))  # fmt: skip
    if speed.measured is not None:
        times = dict(zip(("dense_ms", "sparse_ms"), _milliseconds(speed, workload), strict=True))
        longest = max(timing.tokens for timing in speed.measured.timings)
        notes.append(Note("measured_here", times | {"tokens": longest}))
    else:
        spare = {"device": speed.device.label, "spare_us": speed.spare_us(context, batch)}
        if speed.fixed_us is not None:
            notes.append(Note("fixed_cost_given", spare | {"fixed_us": speed.fixed_us}))
        else:
            notes.append(Note("bandwidth_alone", spare))
            if verdict != NO and _host_bound(speed, context, batch):
                notes.append(Note("host_bound", spare | {"host_us": HOST_US}))
    notes += _memory_reasons(speed, context, batch)
    if model.windows:
        notes.append(Note("windows", {"windows": len(model.windows), "layers": model.layers}))
    if model.experts:
        read = model.read_bytes(batch) / model.weight_bytes
        chosen = {"chosen": model.chosen, "experts": model.experts, "read": read}
        notes.append(Note("experts", chosen))
    return notes


def _memory_reasons(speed: Speed, context: int, batch: int) -> list[Note]:
    model, devices = speed.model, speed.devices(context, batch)
    values = {"devices": devices, "device": speed.device.label, "usable": USABLE,
              "memory_gb": speed.device.memory / 1e9,
              "needed_gb": speed.stored_bytes(context, batch) / 1e9}  # fmt: skip
    cached = model.full_bytes(context) + model.window_bytes(context)
    kept = {"kv_gb": batch * cached / 1e9,
            "codes_gb": batch * model.code_bytes_per_token(speed.bits) * context / 1e9}  # fmt: skip
    fits = Note("does_not_fit" if devices > 1 else "fits", values)
    saved = {"questions": QUESTIONS, "context": context, "tokens": QUESTIONS * context,
             "file_gb": HotMemory(model, speed.bits).bytes(context) / 1e9}  # fmt: skip
    return [fits, Note("memory_not_saved", kept), Note("saved_context", saved)]


def _changes(speed: Speed, workload: Workload, verdict: str) -> list[Note]:
    """The nearest workloads and settings with another verdict."""
    model, context, batch = speed.model, workload.context, workload.batch
    if _beyond(model, context):
        return [Note("within_positions", {"positions": model.positions})]
    if verdict == WORTH:
        return _losses(speed, context, batch)
    notes = []
    longer = least(lambda n: _by_speed(speed, n, batch) == WORTH, _LONGEST)
    if longer is not None:
        longer = -(-longer // _ROUND) * _ROUND
        key = "longer_context_beyond" if _beyond(model, longer) else "longer_context"
        notes.append(Note(key, {"context": longer, "positions": model.positions or 0}))
    larger = least(lambda b: _by_speed(speed, context, b) == WORTH, _MOST_BATCH)
    if larger is not None and larger > batch:
        needed = {"batch": larger, "devices": speed.devices(context, larger)}
        notes.append(Note("larger_batch", needed | {"device": speed.device.label}))
    for key, other, values in _other_settings(speed):
        if VERDICTS.index(_by_speed(other, context, batch)) < VERDICTS.index(verdict):
            notes.append(Note(key, values | {"speedup": other.speedup(context, batch)}))
    if verdict == MARGINAL and _host_bound(speed, context, batch):
        notes += _slower_memory(speed, context, batch)
    if not notes:
        notes.append(Note("nothing_changes", {"budget": float(speed.budget)}))
    return notes + _smaller_device(speed, context, batch)


def _other_settings(speed: Speed) -> Iterator[tuple[str, Speed, dict[str, int]]]:
    """(key, speed, values) of smaller weights, and of one list for the heads of a group."""
    if speed.model.weight_bits > _QUANTISED:
        yield "smaller_weights", speed.quantised(_QUANTISED), {"bits": _QUANTISED}
    if speed.lists == "per_query_head" and speed.model.group > 1 and speed.measured is None:
        shared = replace(speed, lists="per_kv_head")
        yield "shared_lists", shared, {"group": speed.model.group}


def _slower_memory(speed: Speed, context: int, batch: int) -> list[Note]:
    """The fastest known device whose memory is slow enough that more is gained than the host takes:
    empty without one."""
    others = [replace(speed, device=device) for device in DEVICES.values()]
    good = [other for other in others if _by_speed(other, context, batch) == WORTH]
    if not good:
        return []
    best = max(good, key=lambda other: other.device.bandwidth)
    return [Note("other_device", {"device": best.device.label,
                                  "devices": best.devices(context, batch),
                                  "spare_us": best.spare_us(context, batch)})]  # fmt: skip


def _losses(speed: Speed, context: int, batch: int) -> list[Note]:
    """What would take a "worth" away."""
    notes = []
    shortest = least(lambda n: _by_speed(speed, n, batch) == WORTH, context)
    if shortest is not None and shortest > 1:
        notes.append(Note("shorter_context", {"context": shortest, "batch": batch}))
    smallest = least(lambda b: _by_speed(speed, context, b) == WORTH, batch)
    if smallest is not None and smallest > 1:
        notes.append(Note("smaller_batch", {"batch": smallest, "context": context}))
    if speed.measured is None:
        spare = speed.spare_us(context, batch)
        notes.append(Note("fixed_cost", {"spare_us": spare, "device": speed.device.label}))
    return notes + _smaller_device(speed, context, batch)


def _smaller_device(speed: Speed, context: int, batch: int) -> list[Note]:
    """The smallest known device that holds what several of this one would."""
    if speed.devices(context, batch) == 1:
        return []
    needed = speed.stored_bytes(context, batch)
    enough = [d for d in DEVICES.values() if USABLE * d.memory >= needed]
    if not enough:
        return []
    return [Note("fits_on", {"device": min(enough, key=lambda d: d.memory).label})]


def _lines(speed: Speed, workload: Workload) -> list[Figure]:
    model, context, batch = speed.model, workload.context, workload.batch
    even = _even(speed, batch)
    fits = speed.devices
    too_long = least(lambda n: fits(n, batch) > 1, _LONGEST)
    too_many = least(lambda b: fits(context, b) > 1, _MOST_BATCH)
    cached = model.full_bytes(context) + model.window_bytes(context)
    codes = model.code_bytes_per_token(speed.bits)
    dense_ms, sparse_ms = _milliseconds(speed, workload)
    known = speed.measured is not None or speed.fixed_us is not None
    figures = [
        ("kv_bytes_per_token", model.kv_bytes_per_token, "bytes"),
        ("weights", model.weight_bytes, "bytes"),
        ("weights_read", model.read_bytes(batch), "bytes"),
        ("kv", batch * cached, "bytes"),
        ("code_bytes_per_token", codes, "bytes"),
        ("codes", batch * codes * context, "bytes"),
        ("kv_share", speed.share(context, batch), "share"),
        ("ceiling", speed.ceiling(context, batch), "times"),
        ("tokens_read", speed.rows(context), "tokens"),
        ("rows_share", speed.rows_share(context), "share"),
        ("dense_bytes", speed.dense_bytes(context, batch), "bytes"),
        ("sparse_bytes", speed.sparse_bytes(context, batch), "bytes"),
        ("bytes_speedup", speed.bytes_speedup(context, batch), "times"),
        ("dense_ms", dense_ms, "ms"),
        ("sparse_ms", sparse_ms, "ms"),
        ("break_even" if known else "break_even_bytes", even, "tokens"),
        ("stored", speed.stored_bytes(context, batch), "bytes"),
        ("devices", fits(context, batch), "devices"),
        ("longest_context", _below(too_long), "tokens"),
        ("largest_batch", _below(too_many), "sequences"),
    ]
    if speed.measured is not None:
        fixed = 1e6 * speed.measured.sparse.fixed
        figures += [
            ("measured_speedup", speed.speedup(context, batch), "times"),
            ("fixed_us", fixed, "us"),
            ("dense_bandwidth", speed.measured.dense_bandwidth, "bytes a second"),
            ("weights_bandwidth", speed.measured.weights_bandwidth, "bytes a second"),
        ]
    else:
        figures.append(("spare_us", speed.spare_us(context, batch), "us"))
    return [Figure(*figure) for figure in figures]


def _even(speed: Speed, batch: int) -> int | None:
    """The shortest context from which a sparse step gains; None for none."""
    return least(lambda n: speed.sparse_speedup(n, batch) > 1, _LONGEST)


def _milliseconds(speed: Speed, workload: Workload) -> tuple[float, float]:
    """Of a dense and a sparse step, the work being shared evenly by all devices that are needed."""
    context, batch = workload.context, workload.batch
    scale = 1e3 / speed.devices(context, batch)
    return scale * speed.dense_seconds(context, batch), scale * speed.sparse_seconds(context, batch)


def _below(first: int | None) -> int | None:
    """The last that fits, 0 if none does; None where all that were asked for do."""
    return None if first is None else first - 1


def _cost(speed: Speed, workload: Workload) -> Cost | None:
    """Device hours of decoding: a step's seconds / batch, for every answer token."""
    tokens = workload.tokens_per_day
    if not tokens:
        return None
    context, batch = workload.context, workload.batch
    per_second = tokens * workload.days / batch / 3600
    hours = [per_second * s(context, batch) for s in (speed.dense_seconds, speed.policy_seconds)]
    price = workload.price_per_hour
    money = [None if price is None else price * each for each in hours]
    return Cost(*hours, *money, workload.currency, price, tokens, workload.days)

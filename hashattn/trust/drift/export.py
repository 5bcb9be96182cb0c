"""A drift report for others: Prometheus' text format, JSON lines, a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hashattn.base.files import WriteError
from hashattn.trust.drift.report import STATES, DriftReport, LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hashattn.trust.drift.monitor import DriftMonitor

_ALL = "all"  # the label of what is over all layers
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito's
_PIECE = 1 << 16  # bytes that are searched for a line's end at a time
_FLOOR, _TOP = 1e-8, 1e3  # of the drawn evidence
_LEGEND = 6  # layers that a legend names one by one


def prometheus_text(report: DriftReport, labels: Mapping[str, str] | None = None) -> str:
    """The report in Prometheus' text format, from a registry of its own: write it where the node
    exporter's text collector looks, or serve it.

    labels: of every sample, e.g. {"model": "llama"}; names as Prometheus allows them, and none of
    layer, statistic, reason and codes (ValueError by prometheus_client otherwise).
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry, common = CollectorRegistry(), dict(labels or {})

    def gauge(name: str, help_text: str, *names: str) -> Gauge:
        full = f"hashattn_drift_{name}"
        return Gauge(full, help_text, [*common, *names], registry=registry)

    tokens = gauge("tokens", "Tokens since the start or the last reset")
    (tokens.labels(**common) if common else tokens).set(report.steps)
    state = gauge("state", "0 ok, 1 warn, 2 alarm", "layer")
    evidence = gauge(
        "evidence", "Sequential evidence of a shift; 1 raises an alarm", "layer", "statistic"
    )
    recent = gauge("recent", "Mean of the statistic over recent tokens", "layer", "statistic")
    usual = gauge("usual", "Mean of the statistic in the reference", "layer", "statistic")
    seen = gauge("seen", "Values of the statistic seen", "layer", "statistic")
    calls = gauge("rows", "Tokens by layer, and whether or why not sparse", "layer", "reason")
    entropy = gauge("code_entropy_bits", "Entropy of a code, bits independent", "layer", "codes")
    moved = gauge("bit_rates_moved", "Mean change of the rates of bits", "layer", "codes")
    since = gauge("since", "Token at which the shift that raised the alarm began", "layer",
                  "statistic")  # fmt: skip
    for part in (report.overall, *report.layers):
        layer = common | {"layer": _ALL if part.layer is None else str(part.layer)}
        state.labels(**layer).set(STATES.index(part.state))
        if part.cause is not None:
            since.labels(**layer, statistic=part.cause.statistic).set(part.cause.since)
        for name, statistic in part.statistics.items():
            of = layer | {"statistic": name}
            evidence.labels(**of).set(statistic.evidence)
            usual.labels(**of).set(statistic.usual)
            seen.labels(**of).set(statistic.seen)
            if statistic.recent is not None:
                recent.labels(**of).set(statistic.recent)
        for reason, rows in part.calls.items():
            calls.labels(**layer, reason=reason).set(rows)
        for codes, numbers in part.bits.items():
            entropy.labels(**layer, codes=codes).set(numbers["entropy"])
            moved.labels(**layer, codes=codes).set(numbers["moved"])
    return generate_latest(registry).decode()


def append_report(path: str | os.PathLike, report: DriftReport, **more: str | float | int) -> None:
    """Add the report to a file of JSON lines, on the disk before this returns; `more` joins it.

    What a killed process left of its last line is dropped first; one process writes a file.
    Raises WriteError.
    """
    line = json.dumps(report.to_dict() | more, sort_keys=True, allow_nan=False) + "\n"
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with open(path, "rb+") as file:
            file.truncate(_end_of_lines(file))
            file.seek(0, os.SEEK_END)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise WriteError(f"{path} cannot be written ({problem.strerror or problem})") from problem


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _PIECE)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def draw_evidence(
    monitor: DriftMonitor, axis: Axes | None = None, *, shift: int | None = None
) -> Axes:
    """Evidence over tokens, a line for each layer and a thick one for the mean over all layers.

    Dashed lines: a warning, and an alarm at 1; evidence beyond 1,000 is drawn there. A dot marks
    where an alarm of a layer was raised. shift: the token at which the traffic changed, where that
    is known. axis: matplotlib's to draw into, a new one if None.
    """
    if axis is None:
        from matplotlib import pyplot as plt

        axis = plt.subplots(figsize=(8, 4), layout="constrained")[1]
    report = monitor.report()
    steps, curves = monitor.curve
    parts: list[LayerReport] = [*report.layers, report.overall]
    for number, part in enumerate(parts):
        whole = part.layer is None
        name = "mean over layers" if whole else f"layer {part.layer}"
        shown = whole or len(report.layers) <= _LEGEND
        color = "black" if whole else _COLORS[number % len(_COLORS)]
        heights = curves[part.layer].clip(_FLOOR, _TOP)
        axis.plot(steps, heights, color=color, linewidth=2.2 if whole else 1.2,
                  alpha=1.0 if shown else 0.6, label=name if shown else None)  # fmt: skip
        cause = part.cause
        if cause is not None and cause.layer == part.layer:
            axis.plot(cause.step, 1.0, "o", color=color, markersize=6, zorder=3)
    axis.axhline(1.0, color="#d55e00", linestyle="--", linewidth=1, label="alarm")
    axis.axhline(report.warn_at, color="#e69f00", linestyle="--", linewidth=1, label="warning")
    if shift is not None:
        axis.axvline(shift, color="grey", linewidth=1, linestyle=":", label="traffic changed")
    axis.set(yscale="log", xlabel="token", ylabel="evidence of a shift (1: alarm)")
    axis.set_ylim(_FLOOR, 3 * _TOP)
    axis.legend(loc="upper left", fontsize="small", ncols=2)
    return axis

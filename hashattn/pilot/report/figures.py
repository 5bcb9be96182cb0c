"""The report's pictures, as SVG without a word: numbers, units and lines alone, so that one picture
serves every language and needs no font that this machine may lack. Words stand beside them.

Colours are Okabe and Ito's, which readers with colour vision deficiencies can tell apart; lines
also differ by dash, bars by brightness.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hashattn.pilot.report import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawn = tuple[str, float, float]  # an SVG document, its width and height in px

_SPARSE, _FULL, _GUESS, _CODES, _CACHE = "#0072b2", "#1b1f27", "#b34700", "#e69f00", "#0072b2"
# of a legend's entries: (colour, dash of a line or None for a bar)
STYLES = {
    "sparse": (_SPARSE, ""),
    "full": (_FULL, "6 3"),
    "everything": (_FULL, None),
    "guess": (_GUESS, "2 3"),
    "cache": (_CACHE, None),
    "codes": (_CODES, None),
}
_WIDTH = 5.0  # inches of 72 px: 360 px, about a phone's, so that 11 pt stays readable there
_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#1b1f27",
    "xtick.color": "#3d4451",
    "ytick.color": "#3d4451",
    "grid.color": "#e3e1db",
    "svg.fonttype": "path",
    "svg.hashsalt": "hashattn",  # fixes ids, which are random otherwise
}


def score_curve(rows: Sequence[dict[str, Any]], measure: str, guess: float) -> Drawn:
    """Scores, points of 100, against budgets, with full attention's and guessing's as lines. rows:
    of `quality` with this measure; the interval is that of the difference to full attention."""
    scores = [row[measure] for row in rows]
    dense = [100 * each["dense"] for each in scores]
    sparse = [100 * each["sparse"] for each in scores]
    low = [
        min(max(0, d + 100 * each["low"]), s)
        for d, s, each in zip(dense, sparse, scores, strict=True)
    ]
    high = [
        max(min(100, d + 100 * each["high"]), s)
        for d, s, each in zip(dense, sparse, scores, strict=True)
    ]
    with _picture(2.9) as (axis, drawn):
        axis.axhline(dense[0], color=_FULL, dashes=(6, 3), linewidth=1.6, zorder=2)
        axis.axhline(100 * guess, color=_GUESS, dashes=(2, 2.5), linewidth=1.8, zorder=2)
        _with_intervals(axis, rows, sparse, low, high)
        top = max([*high, *dense, 100 * guess])
        axis.set_ylim(0, min(104, max(10, 1.12 * top)))
    return drawn[0]


def kl_curve(rows: Sequence[dict[str, Any]]) -> Drawn:
    """KL against budgets, logarithmic where all is above 0."""
    found = [row["fidelity"] for row in rows]
    kl = [each["kl"] for each in found]
    low = [min(each["kl_low"], each["kl"]) for each in found]
    high = [max(each["kl_high"], each["kl"]) for each in found]
    with _picture(2.9) as (axis, drawn):
        _with_intervals(axis, rows, kl, low, high)
        if min(low) > 0:
            _log_y(axis, min(low), max(high))
        else:
            axis.set_ylim(0, 1.12 * max([*high, 1e-6]))
    return drawn[0]


def latency_bars(latency: dict[str, Any]) -> Drawn:
    """Median milliseconds of full attention ("1/1") and of each budget, lines from low to high."""
    names = ["1/1", *(numbers.fraction(each["budget"]) for each in latency["budgets"])]
    times = [latency["dense_ms"], *(each["ms"] for each in latency["budgets"])]
    with _picture(0.9 + 0.42 * len(names)) as (axis, drawn):
        medians = [each["median"] for each in times]
        errors = [
            [each["median"] - min(each["low"], each["median"]) for each in times],
            [max(each["high"], each["median"]) - each["median"] for each in times],
        ]
        colors = [_FULL, *[_SPARSE] * (len(names) - 1)]
        axis.barh(
            names, medians, 0.62, xerr=errors, color=colors,
            error_kw={"ecolor": "#6b7280", "elinewidth": 1.6, "capsize": 3},
        )  # fmt: skip
        ends = [max(each["high"], each["median"]) for each in times]
        _end_labels(axis, ends, [f"{numbers.significant(each)} ms" for each in medians])
    return drawn[0]


def memory_bars(budgets: Sequence[float], read: Sequence[float], codes: float) -> Drawn:
    """Bytes that a step reads: full attention's ("1/1", the first of `read`) and each budget's, to
    which the codes add."""
    names = ["1/1", *(numbers.fraction(budget) for budget in budgets)]
    added = [0, *[codes] * len(budgets)]
    with _picture(0.9 + 0.42 * len(names)) as (axis, drawn):
        axis.barh(names, read, 0.62, color=[_FULL, *[_CACHE] * len(budgets)])
        axis.barh(names, added, 0.62, left=read, color=_CODES)
        ends = [a + b for a, b in zip(read, added, strict=True)]
        _end_labels(axis, ends, [numbers.size(end) for end in ends])
    return drawn[0]


@contextmanager
def _picture(height: float) -> Any:
    """(axis, list that holds the picture on leaving), without pyplot, whose state is global."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        drawn: list[Drawn] = []
        yield figure.add_subplot(), drawn
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn.append((file.getvalue(), _WIDTH * 72, height * 72))


def _with_intervals(
    axis: Axes,
    rows: Sequence[dict[str, Any]],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> None:
    """A line over budgets, the densest at the left, with bars of intervals."""
    places = range(len(rows))
    errors = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    axis.errorbar(
        places, middle, yerr=errors, color=_SPARSE, marker="o", markersize=6, linewidth=2,
        elinewidth=1.8, capsize=4, zorder=3,
    )  # fmt: skip
    axis.set_xticks(list(places), [numbers.fraction(row["budget"]) for row in rows])
    axis.set_xlim(-0.4, len(rows) - 0.6)
    axis.grid(axis="y")


def _log_y(axis: Axes, least: float, most: float) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of each decade it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.set_ylim(least / 1.4, most * 1.4)
    subs = (1.0, 2.0, 5.0) if most / least < 100 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(10, subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _end_labels(axis: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """A number at the end of each bar in place of an axis; the first bar at the top."""
    for place, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axis.annotate(label, (end, place), (6, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.3 * max([*ends, 1e-9]))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)

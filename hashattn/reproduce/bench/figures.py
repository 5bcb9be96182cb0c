"""Figures of measured steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from hashattn.reproduce.plots import log_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# variant: colour (Okabe and Ito), marker, name in a legend
STYLES = {
    "torch": ("#000000", "s", "torch, fastest call"),
    "dense": ("#7f7f7f", "P", "dense, this package"),
    "default": ("#0072b2", "o", "the default"),
    "default_kv_lists": ("#009e73", "D", "the default, a list per KV head"),
    "default_drawn": ("#cc79a7", "v", "the default, half drawn"),
    "paper": ("#56b4e9", "^", "bits against bits"),
    "paper_kv_lists": ("#e69f00", "<", "bits against bits, a list per KV head"),
}


def step_times(axis: Axes, speedups: pd.DataFrame) -> None:
    """Milliseconds of a step over cached tokens; `speedups` of one thread count and dtype."""
    _lines(axis, speedups, {name: f"{name} ms" for name in STYLES})
    axis.set(yscale="log", xlabel="cached tokens", ylabel="ms per step and layer (median)")


def speed_up(axis: Axes, speedups: pd.DataFrame) -> None:
    """Speed-up over torch's fastest dense call; below the line at 1 is a loss."""
    table = speedups.assign(**{"dense / torch": speedups["torch ms"] / speedups["dense ms"]})
    _lines(axis, table, {name: f"{name} / torch" for name in STYLES if name != "torch"})
    axis.axhline(1, color="#000000", linewidth=1)
    axis.set(yscale="log", xlabel="cached tokens", ylabel="speed-up over torch's fastest call")
    ticks = [0.5, 1, 2, 4, 8, 16, 32]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def stage_bars(axis: Axes, stages: pd.DataFrame) -> None:
    """Milliseconds of encode, select and attend, each a call, stacked, by cached tokens."""
    colors = ["#e69f00", "#56b4e9", "#0072b2"]
    named = stages[["encode", "select", "attend"]].rename(index=lambda n: f"{n // 1024}K")
    named.plot.bar(stacked=True, ax=axis, color=colors, width=0.6)
    axis.legend(title=None)
    axis.set(xlabel="cached tokens", ylabel="ms per step and layer")
    axis.tick_params(axis="x", rotation=0)


def legend(figure: Figure, axis: Axes) -> None:
    """The legend of `axis` below all axes of a figure, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)


def _lines(axis: Axes, table: pd.DataFrame, columns: dict[str, str]) -> None:
    for name, column in columns.items():
        if column in table:
            color, marker, label = STYLES[name]
            axis.plot(table.index, table[column], color=color, marker=marker, label=label)
    lengths = list(table.index)
    log_axis(axis, lengths, [f"{n // 1024}K" for n in lengths])

"""Figures and tables of the notebooks: one style, and files that are the same for the same numbers.

Each method has one colour and one marker in every figure, set by its class; the main methods use
Okabe and Ito's colours, which readers with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from colorsys import hls_to_rgb
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hashattn.base.checks import require_one_of
from hashattn.base.files import replacing, write_text
from hashattn.evaluation.measures.selection_map import KINDS
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import HASH_VARIANTS, METHODS, MethodStyle, selector_class

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hashattn.evaluation.measures.selection_map import SelectionMap

# one for each of selection_map.KINDS: white, greys, then Okabe and Ito's
_SELECTION_COLORS = ("#ffffff", "#eeeeee", "#bbbbbb", "#0072b2", "#e69f00", "#d55e00")
_SVG_SALT = "hashattn"  # fixes the ids inside an SVG, which are random otherwise
METADATA = {"png": {"Software": None}, "svg": {"Date": None}}
_GOLDEN = 0.618034  # of a turn between successive default hues: none comes close to an earlier one


def method_styles() -> dict[str, MethodStyle]:
    """The style of every method and hash variant by name, no colour or marker twice.

    The class's style, or an unused default where the class has none or an earlier name has taken
    it.
    """
    declared = {name: selector_class(name).style for name in METHODS}
    declared |= {name: variant.style for name, variant in HASH_VARIANTS.items()}
    defaults = _free_styles({style.color for style in declared.values() if style is not None})
    styles: dict[str, MethodStyle] = {}
    for name, style in declared.items():
        if style is None or style in styles.values():
            style = next(defaults)._replace(label=name.replace("_", " "))
        styles[name] = style
    return styles


def _free_styles(colors: set[str]) -> Iterator[MethodStyle]:
    """Styles without a label, in a fixed order: stars with ever more points, none in `colors`."""
    for number in count():
        rgb = hls_to_rgb(number * _GOLDEN % 1, 0.4, 0.6)
        color = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
        if color not in colors:
            yield MethodStyle(color, (9 + number, 1, 0), "")


def method_style(name: str) -> MethodStyle:
    """The style of a method or of a setting of it, "<method> ..." ("lsh 256 bits").

    Raises ValueError for an unknown method.
    """
    method, styles = name.split(" ")[0], method_styles()
    require_one_of("method", method, styles)
    return styles[method]


def palette(names: Iterable[str]) -> dict[str, str]:
    """{name: colour} for seaborn's `palette`."""
    return {name: method_style(name).color for name in names}


def markers(names: Iterable[str]) -> dict[str, str]:
    """{name: marker} for seaborn's `markers`."""
    return {name: method_style(name).marker for name in names}


def use_style() -> None:
    """Draw every following figure in the project's style."""
    import matplotlib
    import seaborn

    seaborn.set_theme(context="notebook", style="ticks", palette="colorblind")
    matplotlib.rcParams.update({
        "figure.figsize": (6.4, 3.8),
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "savefig.bbox": "tight",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.4,
        "legend.frameon": False,
        "svg.hashsalt": _SVG_SALT,
    })  # fmt: skip


def log_axis(axis: Axes, values: Iterable[float], labels: Iterable[str]) -> None:
    """A logarithmic x axis with these ticks alone."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.set_xticks(list(values), list(labels))
    axis.xaxis.set_minor_locator(NullLocator())  # the labels of minor ticks would overlap ours


def method_lines(axis: Axes, table: pd.DataFrame, x: str, y: str, hue: str = "method") -> None:
    """One line per method in its style, dashed for codes per query head, legend at the right."""
    import seaborn

    names = list(dict.fromkeys(table[hue]))
    dashes = {name: (2, 2) if "per_query_head" in name else "" for name in names}
    seaborn.lineplot(
        table, x=x, y=y, hue=hue, style=hue, palette=palette(names), markers=markers(names),
        dashes=dashes, errorbar=None, ax=axis,
    )  # fmt: skip
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def quality_lines(axis: Axes, compared: pd.DataFrame) -> None:
    """Score over sparsity of comparison_table's methods, the window left out; the dense score as a
    line, and the interval of each difference from it as a band. 16x and 32x are marked."""
    dense = float(compared.loc[compared["method"] == "dense", "score"].iloc[0])
    curve = compared[~compared["method"].isin(["dense", "window"])]
    method_lines(axis, curve, "sparsity", "score")
    ends = {"low": dense + curve["low"], "high": dense + curve["high"]}
    method_bands(axis, curve.assign(**ends), "sparsity", "low", "high")
    axis.axhline(dense, color="black", linewidth=1)
    sparsity_axis(axis, curve["sparsity"])
    for marked in {16, 32} & set(axis.get_xticks()):
        axis.axvline(marked, color="grey", linestyle=":", linewidth=1)


def method_bands(axis: Axes, table: pd.DataFrame, x: str, low: str, high: str) -> None:
    """The interval between two columns around each method's line, in its colour."""
    for method, part in table.groupby("method"):
        axis.fill_between(part[x], part[low], part[high], alpha=0.12, linewidth=0,
                          color=method_style(method).color)  # fmt: skip


def sparsity_axis(axis: Axes, sparsity: Iterable[float]) -> None:
    """A logarithmic x axis of tokens cached over tokens read, with the powers of two among them."""
    ticks = sorted({2 ** round(math.log2(x)) for x in sparsity})
    log_axis(axis, ticks, [f"{x}x" for x in ticks])
    axis.set_xlabel("tokens cached / tokens read")


def draw_selection(axis: Axes, selected: SelectionMap) -> None:
    """A picture of what a selector reads: a row per query, a column per token."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows, n = selected.kinds.shape
    axis.imshow(
        selected.kinds.numpy(), cmap=ListedColormap(_SELECTION_COLORS), vmin=0,
        vmax=len(KINDS) - 1, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axis.grid(False)
    axis.set_xlabel(f"token (of {n})")
    axis.set_ylabel(f"query row ({int(selected.positions[0])} to {int(selected.positions[-1])})")
    axis.set_title(f"{selected.method}, layer {selected.layer}, head {selected.head}: "
                   f"{selected.hits:.0%} of the best")  # fmt: skip
    kinds = zip(KINDS[1:], _SELECTION_COLORS[1:], strict=True)
    handles = [Patch(color=color, label=label) for label, color in kinds]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))


def save_figure(figure: Figure, name: str, results: Path | None = None) -> tuple[Path, Path]:
    """Write figures/<name>.png and .svg in the profile's results; returns both paths.

    The same figure gives the same bytes: neither file says when or by which version it was written.
    """
    import matplotlib

    folder = _folder(results, "figures")
    paths = tuple(folder / f"{name}.{kind}" for kind in ("png", "svg"))
    with matplotlib.rc_context({"svg.hashsalt": _SVG_SALT}):
        for path in paths:
            kind = path.suffix[1:]
            with replacing(path) as partial:
                figure.savefig(partial, format=kind, metadata=METADATA[kind])
    return paths


def save_table(table: pd.DataFrame, name: str, results: Path | None = None) -> Path:
    """Write tables/<name>.csv in the profile's results, six significant digits; returns its path.

    If contexts were cut (attrs["cut"], set by evaluation.tables), that is printed and written as a
    column of the file.
    """
    path = _folder(results, "tables") / f"{name}.csv"
    if "cut" in table.attrs:
        print(f"{name}: {table.attrs['cut']}")
        table = table if "cut" in table else table.assign(cut=table.attrs["cut"])
    named_rows = any(name is not None for name in table.index.names)
    return write_text(
        path, table.to_csv(index=named_rows, float_format="%.6g", lineterminator="\n")
    )


def save_text(text: str, name: str, results: Path | None = None) -> Path:
    """Write tables/<name> in the profile's results; returns its path."""
    return write_text(_folder(results, "tables") / name, text + "\n")


def _folder(results: Path | None, kind: str) -> Path:
    return Path(results or load_profile().results) / kind

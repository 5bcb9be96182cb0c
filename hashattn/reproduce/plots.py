"""Figures and tables of the notebooks: one style, and files that are the same for the same numbers.

Each method has one colour and one marker in every figure, which its class names; those of the main
methods are Okabe and Ito's, which readers with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from colorsys import hls_to_rgb
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hashattn.base.files import replacing, write_text
from hashattn.evaluation.measures.selection_map import KINDS
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors import HASH_VARIANTS, METHODS, MethodStyle, selector_class

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hashattn.evaluation.measures.selection_map import SelectionMap


# of selection_map.KINDS: white, then Okabe and Ito's for what was read and what was missed
SELECTION_COLORS = ("#ffffff", "#eeeeee", "#bbbbbb", "#0072b2", "#e69f00", "#d55e00")
SVG_SALT = "hashattn"  # fixes the ids inside an SVG, random otherwise
METADATA = {"png": {"Software": None}, "svg": {"Date": None}}
GOLDEN = 0.618034  # of a turn from one default hue to the next: none comes close to an earlier one


def method_styles() -> dict[str, MethodStyle]:
    """The style of every method and hash variant by name, no colour or marker twice.

    Of its class; a free default one where the class has none, or an earlier name has that style.
    """
    own = {name: selector_class(name).style for name in METHODS}
    own |= {name: variant.style for name, variant in HASH_VARIANTS.items()}
    named = [style for style in own.values() if style is not None]
    defaults = _free_styles({style.color for style in named})
    styles: dict[str, MethodStyle] = {}
    for name, style in own.items():
        if style is None or style in styles.values():
            style = next(defaults)._replace(label=name.replace("_", " "))
        styles[name] = style
    return styles


def _free_styles(colors: set[str]) -> Iterator[MethodStyle]:
    """Styles without a label, always the same: stars of ever more points, in none of `colors`."""
    for number in count():
        rgb = hls_to_rgb(number * GOLDEN % 1, 0.4, 0.6)
        color = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
        if color not in colors:
            yield MethodStyle(color, (9 + number, 1, 0), "")


def method_style(name: str) -> MethodStyle:
    """The style of a method, also of a variant called "<method> ..." ("lsh 256 bits").

    Raises ValueError for a method without a style.
    """
    method, styles = name.split(" ")[0], method_styles()
    if method not in styles:
        raise ValueError(f"method {name!r} has no style: start it with {', '.join(styles)}")
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
        "svg.hashsalt": SVG_SALT,
    })  # fmt: skip


def log_axis(axis: Axes, values: Iterable[float], labels: Iterable[str]) -> None:
    """A logarithmic x axis with these ticks and no others, whose labels would overlap."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.set_xticks(list(values), list(labels))
    axis.xaxis.set_minor_locator(NullLocator())


def method_lines(axis: Axes, table: pd.DataFrame, x: str, y: str, hue: str = "method") -> None:
    """One line a method in its own style, dashed for a code per query head, legend at the right."""
    import seaborn

    names = list(dict.fromkeys(table[hue]))
    dashes = {name: (2, 2) if "per_query_head" in name else "" for name in names}
    seaborn.lineplot(
        table, x=x, y=y, hue=hue, style=hue, palette=palette(names), markers=markers(names),
        dashes=dashes, errorbar=None, ax=axis,
    )  # fmt: skip
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_selection(axis: Axes, selected: SelectionMap) -> None:
    """A picture of what a selector reads: a row for each query, a column for each token."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows, n = selected.kinds.shape
    axis.imshow(
        selected.kinds.numpy(), cmap=ListedColormap(SELECTION_COLORS), vmin=0,
        vmax=len(KINDS) - 1, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axis.grid(False)
    axis.set_xlabel(f"token (of {n})")
    axis.set_ylabel(f"query row ({int(selected.positions[0])} to {int(selected.positions[-1])})")
    axis.set_title(f"{selected.method}, layer {selected.layer}, head {selected.head}: "
                   f"{selected.hits:.0%} of the best")  # fmt: skip
    kinds = zip(KINDS[1:], SELECTION_COLORS[1:], strict=True)
    handles = [Patch(color=color, label=label) for label, color in kinds]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))


def save_figure(figure: Figure, name: str, results: Path | None = None) -> tuple[Path, Path]:
    """Write figures/<name>.png and .svg in the profile's results; returns both paths.

    The same figure gives the same bytes: neither file says when or by what it was written.
    """
    import matplotlib

    folder = _folder(results, "figures")
    paths = tuple(folder / f"{name}.{kind}" for kind in ("png", "svg"))
    with matplotlib.rc_context({"svg.hashsalt": SVG_SALT}):
        for path in paths:
            kind = path.suffix[1:]
            with replacing(path) as partial:
                figure.savefig(partial, format=kind, metadata=METADATA[kind])
    return paths


def save_table(table: pd.DataFrame, name: str, results: Path | None = None) -> Path:
    """Write tables/<name>.csv in the profile's results, numbers to six digits; returns its path.

    A table of contexts that were cut (attrs["cut"], evaluation.tables) says so: in print, and in a
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

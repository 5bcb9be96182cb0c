"""Notebook 02's frontier: output error against density, by what a method stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from hashattn.evaluation.measures.allocation import allocate
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.evaluation.statistics import ABOVE, BELOW, SAME, Difference, paired_bootstrap
from hashattn.evaluation.tables import (
    dataset_weights,
    difference_to,
    note_cuts,
    require_one_protocol,
)
from hashattn.hashing.capture import CapturedLayer
from hashattn.reproduce import plots
from hashattn.reproduce.experiments.common import captured
from hashattn.reproduce.experiments.contenders import SLACK
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIANTS, LINES = "os^vDPX", ("-", "--", ":", "-.")
FAMILY_SEED = 4000  # sequences that no other measurement of the notebooks uses
PAIRED = ["sequence", "layer", "head"]
BOUNDS = ("oracle", "dense")
OURS = ("hash", "rerank", "residual")  # first words of this package's methods in notebook 03


def frontier(
    profile: Profile, model, tokenizer, chosen: Mapping[str, Selector], lengths: Iterable[int],
    densities: Iterable[float], shares: tuple[tuple[float, ...], ...] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """selection_metrics by KV head, with output error, of profile.sequences held-out sequences of
    every length, at densities that count sink and local tokens; also columns sequence, context and
    budget (the density asked for). shares: as in Budget."""
    rows = []
    for length in lengths:
        for sequence in range(profile.sequences):
            seed = FAMILY_SEED + sequence
            layers = captured(profile, model, tokenizer, length, 1, seed=seed, values=True)
            n, fixed = layers[0].keys.shape[1], profile.sink + profile.local
            heavy = {density: max(0, int(density * n) - fixed) for density in densities}
            budgets = sorted(set(heavy.values()))
            made = selection_metrics(layers, chosen, budgets, profile.sink, profile.local,
                               by_head=True, shares=shares)  # fmt: skip
            rows += [
                row | {"sequence": sequence, "context": length, "budget": density}
                for density, tokens in heavy.items()
                for row in made
                if row["heavy"] == tokens
            ]
    return pd.DataFrame(rows)


def divided(
    profile: Profile, calibrated: list[CapturedLayer], selector: Selector, density: float
) -> tuple[tuple[float, ...], ...]:
    """Budget.shares of a selector, allocated at one density on the calibration sequences."""
    heavy = max(1, int(density * profile.training.length) - profile.sink - profile.local)
    return allocate(calibrated, selector, heavy, profile.sink, profile.local)


def summary(rows: pd.DataFrame, measure: str = "output_error") -> pd.DataFrame:
    """A measure by method (lines, with bits) and budget (columns "1/8", ...), all contexts."""
    table = rows.groupby(["method", "bits", "budget"], sort=False)[measure].mean().unstack()
    table = table[sorted(table, reverse=True)]
    return table.rename(columns=label)


def label(density: float) -> str:
    """ "1/8" for 0.125."""
    return f"1/{1 / density:g}"


def first_layer_dense(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """What a dense first layer would change: density and output error of `method` at each budget,
    as it is and with layer 0 read whole."""
    own = rows[rows["method"] == method]
    spared = own.assign(
        output_error=own["output_error"].where(own["layer"] > 0, 0.0),
        density=own["density"].where(own["layer"] > 0, 1.0),
    )
    parts = {"as it is": own, "first layer dense": spared}
    measures = {
        name: part.groupby("budget")[["density", "output_error"]].mean()
        for name, part in parts.items()
    }
    return pd.concat(measures, axis=1).sort_index(ascending=False).rename(index=label)


def by_head(rows: pd.DataFrame, method: str, budget: float) -> pd.DataFrame:
    """Mean output error of a method, layers by KV heads, at one budget."""
    here = rows[(rows["budget"] == budget) & (rows["method"] == method)]
    return here.groupby(["layer", "head"])["output_error"].mean().unstack()


def verdicts(rows: pd.DataFrame, ours: str) -> pd.DataFrame:
    """`ours` against every method of another family, at every context and budget.

    A line each: the other method, its bits, whether these are as many as ours or more, both mean
    output errors, their difference (ours minus theirs, below 0: ours is better) with the ends of a
    paired bootstrap interval over sequences, layers and KV heads, taken as independent, and the
    verdict: "better", "worse" or "not distinguishable". Oracles are no methods.
    """
    own = rows[rows["method"] == ours]
    least = own["bits"].iloc[0]
    lines = []
    for (method, context, budget), part in rows.groupby(["method", "context", "budget"]):
        family = method.split()[0]
        if family in (*BOUNDS, ours.split()[0]):
            continue
        here = own[(own["context"] == context) & (own["budget"] == budget)]
        pairs = here.merge(part, on=PAIRED, suffixes=("", " theirs"))
        found = paired_bootstrap(
            pairs["output_error"].tolist(), pairs["output_error theirs"].tolist()
        )
        bits = part["bits"].iloc[0]
        lines.append({
            "method": method, "bits": bits, "as_many_bits": bits >= least, "context": context,
            "budget": label(budget), "ours": here["output_error"].mean(),
            "theirs": part["output_error"].mean(), **_outcome(found, better=BELOW),
        })  # fmt: skip
    return pd.DataFrame(lines)


def task_verdicts(results: pd.DataFrame, ours: str) -> pd.DataFrame:
    """The same for task quality: `ours` against every method at each budget they share, over the
    results of `evaluate`.

    Scores, difference, low and high in points averaged over datasets, from a paired bootstrap over
    contexts; above 0: ours is better.
    """
    require_one_protocol(results)
    own, lines = results[results["method"] == ours], []
    least = own["nominal_bits"].max()
    for (method, budget), part in results.groupby(["method", "budget"], sort=False):
        bits, here = part["nominal_bits"].max(), own[own["budget"] == budget]
        if method.split("_")[0] in (*BOUNDS, *OURS) or here.empty:
            continue
        found = difference_to(here, part.set_index("sample"), n=2000, seed=0).scaled(100)
        weighted = [100 * (x["score"] * dataset_weights(x)).mean() for x in (here, part)]
        lines.append({
            "method": method, "bits": bits, "as_many_bits": bits >= least, "budget": budget,
            "ours": weighted[0], "theirs": weighted[1], **_outcome(found, better=ABOVE),
        })  # fmt: skip
    return note_cuts(pd.DataFrame(lines), results)


def _outcome(found: Difference, better: str) -> dict[str, float | str]:
    """Columns of a difference of ours: itself, its interval and the verdict in our terms."""
    verdict = {SAME: SAME, better: "better"}.get(found.verdict, "worse")
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "verdict": verdict,
    }


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How often each verdict fell on each method."""
    found = table.groupby(["bits", "method"])["verdict"].value_counts().unstack(fill_value=0)
    return found.reindex(columns=["better", "not distinguishable", "worse"], fill_value=0)


def losses(rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame], method: str) -> str:
    """Where `method` loses, as Markdown, all from the records.

    rows: of `frontier`. tables: {our method: its verdicts}.
    """
    lines = []
    for ours, table in tables.items():
        lost = table[table["verdict"] != "better"]
        sizes = {True: "as many bits or more", False: "fewer"}
        parts = [
            f"{(part['verdict'] == 'better').sum()} of {len(part)} comparisons with methods of "
            + sizes[many]
            for many, part in sorted(table.groupby("as_many_bits"), reverse=True)
        ]
        lines.append(f"- {ours}: better in {' and '.join(parts)}.")
        for (other, bits), part in lost.groupby(["method", "bits"]):
            worse = part[part["verdict"] == "worse"]
            same = len(part) - len(worse)
            text = f"  - {other} ({bits:g} bits):"
            if len(worse):
                gap = (worse["ours"] / worse["theirs"]).max()
                where = ", ".join(f"{c // 1024}K {b}" for c, b in
                                  zip(worse["context"], worse["budget"], strict=True))  # fmt: skip
                text += f" worse in {len(worse)} ({where}), error up to {gap:.2f} times theirs;"
            lines.append(f"{text} not distinguishable in {same}.")
    own, bound = (
        rows[rows["method"] == name].groupby("budget")["output_error"].mean()
        for name in (method, "oracle")
    )
    ends = [
        f"{own[budget]:.3f} at {label(budget)} (oracle {bound[budget]:.3f})"
        for budget in (max(own.index), min(own.index))
    ]
    lines.append(f"- Tiny budgets: its mean error grows from {ends[0]} to {ends[1]}.")
    return "\n".join([*lines, _spread(rows, method)])


def _spread(rows: pd.DataFrame, method: str) -> str:
    """The heads that aggregate: their attention lies on more tokens than the budget holds."""
    budget = sorted(rows["budget"].unique())[len(rows["budget"].unique()) // 2]
    here = rows[rows["budget"] == budget].set_index(["context", *PAIRED])
    bound, own = (here[here["method"] == name] for name in ("oracle", method))
    most = bound["heavy_mass"].rank(pct=True)
    errors = {
        name: (own["output_error"][chosen].mean(), bound["output_error"][chosen].mean())
        for name, chosen in (("spread", most <= 0.25), ("focused", most > 0.75))
    }
    return (
        f"- Aggregation: in the quarter of heads whose attention is spread the most, at "
        f"{label(budget)} its error is {errors['spread'][0]:.3f} (oracle {errors['spread'][1]:.3f}"
        f"), in the most focused quarter {errors['focused'][0]:.3f} (oracle "
        f"{errors['focused'][1]:.3f}): what needs all tokens is lost to any top-k."
    )


def at_memory(table: pd.DataFrame, bits: int) -> list[str]:
    """Methods of `summary` for a panel: the oracle, ours, and of every other family the best that
    stores no more than `bits`, an eighth more allowed for what pages and labels need."""
    found = table.reset_index("bits")
    found = found[found["bits"] <= SLACK * bits]
    mean = found.drop(columns="bits").mean(axis=1)
    best: dict[str, str] = {}
    for name in mean.sort_values().index:
        family = name.split()[0]
        if family not in ("oracle", "hash"):
            best.setdefault(family, name)
    own = [name for name in (f"hash {bits} bits", "hash official") if name in found.index]
    return ["oracle", *own, *sorted(best.values())]


def head_map(axis: Axes, table: pd.DataFrame) -> None:
    """A table of `by_head` as colours with numbers."""
    import seaborn

    seaborn.heatmap(table, annot=True, fmt=".3f", cmap="viridis", cbar=False, ax=axis)
    axis.set(xlabel="KV head", ylabel="layer")


def error_lines(axis: Axes, table: pd.DataFrame, names: Iterable[str]) -> None:
    """Output error over density for some methods of `summary`, their bits in the legend."""
    labels, seen = list(table.columns), Counter()
    for name in names:
        line = table.xs(name, level="method")
        bits, style = line.index[0], plots.method_style(name)
        # variants of a method share its colour and differ by marker and line
        family = seen[style.color]
        seen[style.color] += 1
        axis.plot(range(len(labels)), line.iloc[0], marker=VARIANTS[family % len(VARIANTS)],
                  color=style.color, linestyle=LINES[family % len(LINES)],
                  label=f"{name} ({bits:g} bits)")  # fmt: skip
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2, fontsize=8)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(xlabel="density (tokens read / tokens cached)", ylabel="output error", yscale="log")

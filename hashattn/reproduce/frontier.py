"""Notebook 02's frontier: output error against density, by what a method stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from hashattn import plots
from hashattn.evaluation.recall import recall_rows
from hashattn.evaluation.statistics import paired_bootstrap
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.weights import HashWeights
from hashattn.profiles import Profile
from hashattn.reproduce.experiments import captured
from hashattn.selectors import make_selector
from hashattn.selectors.base import Selector
from hashattn.selectors.double_sparsity import DoubleSparsitySelector as DoubleSparsity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIANTS, LINES = "os^vDPX", ("-", "--", ":", "-.")
FAMILY_SEED = 4000  # sequences that no other measurement of the notebooks uses


def contenders(
    profile: Profile, weights: HashWeights, calibrated: list[CapturedLayer]
) -> dict[str, Selector]:
    """Our codes with each trick, and the other methods at as many bits, twice and four times.

    Quest per query head, as its authors run it; Double Sparsity with labels per KV head, its best
    layout at equal memory.
    """
    head_dim, bits = weights.config.head_dim, weights.config.bits
    ours = make_selector("hash", weights=weights)
    asymmetric = make_selector("hash", weights=weights, scoring="asymmetric")
    labels = {"channel_layout": "per_kv_head", "layout": "query_head"}

    def double(channels: int, label_bits: int) -> Selector:
        return DoubleSparsity.calibrate(
            calibrated, channels_per_head=channels, label_bits=label_bits, **labels
        )

    found = {
        "oracle": make_selector("oracle"),
        "oracle per KV head": make_selector("oracle", layout="kv_head"),
        "hash": ours,
        "hash asymmetric": asymmetric,
        "hash re-ranked 2x": make_selector("rerank", base=ours, factor=2),
        "hash asymmetric, re-ranked 2x": make_selector("rerank", base=asymmetric, factor=2),
        "hash asymmetric, re-ranked 4x": make_selector("rerank", base=asymmetric, factor=4),
        "hash and a sample": make_selector("residual", base=ours, share=0.25, seed=profile.seed),
        "double_sparsity 2-bit labels": double(head_dim // 4, 2),
        "double_sparsity 4-bit labels": double(3 * head_dim // 8, 4),
        "quest page 16, 4 bits": make_selector("quest", page=16, bits=4),
        "quest page 8, 4 bits": make_selector("quest", page=8, bits=4),
        "quest page 16, 16 bits": make_selector("quest", page=16, bits=16),
    }
    for factor in (1, 4):
        found[f"lsh {factor * bits} bits"] = make_selector(
            "lsh", bits=factor * bits, seed=profile.seed
        )
    return found


def frontier(
    profile: Profile, model, tokenizer, chosen: Mapping[str, Selector], lengths: Iterable[int],
    densities: Iterable[float], count: int = 2,
) -> pd.DataFrame:  # fmt: skip
    """recall_rows with output error of `count` held-out sequences of every length, at densities
    that count sink and local tokens; columns sequence, context and budget (the density asked for).
    """
    rows = []
    for length in lengths:
        for sequence in range(count):
            seed = FAMILY_SEED + sequence
            layers = captured(profile, model, tokenizer, length, 1, seed=seed, values=True)
            n, fixed = layers[0].keys.shape[1], profile.sink + profile.local
            heavy = {density: max(0, int(density * n) - fixed) for density in densities}
            budgets = sorted(set(heavy.values()))
            made = recall_rows(layers, chosen, budgets, profile.sink, profile.local)
            rows += [
                row | {"sequence": sequence, "context": length, "budget": density}
                for density, tokens in heavy.items()
                for row in made
                if row["heavy"] == tokens
            ]
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame, measure: str = "output_error") -> pd.DataFrame:
    """A measure by method (lines, with bits) and budget (columns "1/8", ...), all contexts."""
    table = rows.groupby(["method", "bits", "budget"], sort=False)[measure].mean().unstack()
    table = table[sorted(table, reverse=True)]
    return table.rename(columns=lambda density: f"1/{1 / density:g}")


def verdicts(rows: pd.DataFrame, ours: str) -> pd.DataFrame:
    """`ours` against every method of another family with at least as many bits, at every context
    and budget.

    A line each: the other method, its bits, the difference of mean output errors (ours minus
    theirs, below 0: ours is better) with the ends of a paired bootstrap interval over sequences and
    layers, taken as independent, and the verdict: "better", "worse" or "not distinguishable".
    Oracles are no methods.
    """
    own = rows[rows["method"] == ours]
    least = own["bits"].iloc[0]
    lines = []
    for (method, context, budget), part in rows.groupby(["method", "context", "budget"]):
        if method.split()[0] in ("oracle", ours.split()[0]) or part["bits"].iloc[0] < least:
            continue
        here = own[(own["context"] == context) & (own["budget"] == budget)]
        pairs = here.merge(part, on=["sequence", "layer"], suffixes=("", " theirs"))
        found = paired_bootstrap(
            pairs["output_error"].tolist(), pairs["output_error theirs"].tolist()
        )
        words = {"below": "better", "above": "worse"}
        lines.append({
            "method": method, "bits": part["bits"].iloc[0], "context": context,
            "budget": f"1/{1 / budget:g}", "difference": found.difference, "low": found.low,
            "high": found.high, "verdict": words.get(found.verdict, found.verdict),
        })  # fmt: skip
    return pd.DataFrame(lines)


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

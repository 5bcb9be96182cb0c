"""Ranked beside drawn reading of every method whose scores can estimate logits: notebooks 02, 03.

A name with "drawn" after it is the same method at the same budget, half of it drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from hashattn.attention.budget import Budget
from hashattn.evaluation.measures.drawing import drawing_errors
from hashattn.evaluation.methods import Method
from hashattn.evaluation.statistics import BELOW, paired_bootstrap
from hashattn.hashing.capture import CapturedLayer
from hashattn.reproduce import plots
from hashattn.reproduce.experiments.common import captured
from hashattn.reproduce.experiments.frontier import label, outcome
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors import make_selector
from hashattn.selectors.base import Selector
from hashattn.selectors.magicpig import MagicPIGSelector
from hashattn.selectors.slopes import fit_slopes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARE = 0.5  # of the heavy tokens
_DRAWN = " drawn"
_FAMILIES = ("oracle", "hash", "transform", "rabitq", "pqcache", "loki", "double_sparsity", "hata",
             "lsh")  # fmt: skip
_ROWS = 32
_ASKED = {"hash": {"8x": 1, "16x": 1}, "hash_64": {"8x": 1 / 10, "16x": 1 / 6, "32x": 1 / 3}}
_SEQUENCE = 4000  # seed of a sequence that the frontier measures too
_PAIRED = ["dataset", "sample"]


def drawable(
    selectors: Mapping[str, Selector], calibrated: Iterable[CapturedLayer],
    layers: Iterable[int] | None = None,
) -> dict[str, Selector]:  # fmt: skip
    """The selectors of _FAMILIES that rank, with slopes: their own, or those of `layers` (None:
    all) fitted to the first captured sequence."""
    wanted = None if layers is None else set(layers)
    first: dict[int, CapturedLayer] = {}
    for layer in calibrated:
        if wanted is None or layer.layer in wanted:
            first.setdefault(layer.layer, layer)
    found = {}
    for name, selector in selectors.items():
        if not name.split()[0].startswith(_FAMILIES) or not selector.ranks or selector.observes:
            continue
        estimates = all(map(selector.estimates_logits, first))
        found[name] = selector if estimates else fit_slopes(selector, first.values())
    return found


def samplers(
    selectors: Mapping[str, Selector], bases: Iterable[str], calibrated: Iterable[CapturedLayer],
    seed: int,
) -> dict[str, Selector]:  # fmt: skip
    """Methods of others that sample by themselves: vAttention beside the best of some `bases` among
    the selectors, its sample uniform, as large as epsilon and delta ask for, or by weights (its
    successor); and MagicPIG in its authors' size."""
    found = {}
    for name in bases:
        base = selectors[name] if name in selectors else make_selector(name)
        given = {"base": base, "seed": seed}
        found[f"residual of {name}"] = make_selector("residual", share=_SHARE, **given)
        found[f"residual of {name}, epsilon"] = make_selector(
            "residual", share=_SHARE / 2, epsilon=0.1, delta=0.1, **given
        )
        found[f"residual of {name}, by weights"] = make_selector(
            "residual", share=_SHARE, proposal="weights", **given
        )
    return found | {"magicpig": MagicPIGSelector.calibrate(calibrated, seed=seed)}


def drawn_methods(
    profile: Profile, ranked: Mapping[str, Selector], own: Mapping[str, Selector],
    densities: Iterable[float], seeds: int = 1,
) -> list[Method]:  # fmt: skip
    """For every density each ranked selector twice, by rank and drawn (once for each seed, the
    later ones as "drawn 1" and so on), and those that sample by themselves."""
    window, found = (profile.sink, profile.local), []
    for density in densities:
        for name, selector in ranked.items():
            found.append(Method(name, selector, Budget(*window, density=density)))
            for seed in range(seeds):
                budget = Budget(*window, density=density, sampled=_SHARE, seed=profile.seed + seed)
                found.append(Method(name + _DRAWN + f" {seed}" * (seed > 0), selector, budget))
        found += [Method(n, s, Budget(*window, density=density)) for n, s in own.items()]
    return found


def drawn_errors(
    profile: Profile, model, tokenizer, selectors: Mapping[str, Selector],
    densities: Iterable[float], draws: int = 4,
) -> pd.DataFrame:  # fmt: skip
    """Relative root mean squared output error of _ROWS queries of a held-out sequence, bias and
    spread apart, by method, density and reading ("ranked", "drawn", or "its own")."""
    layers = captured(profile, model, tokenizer, profile.frontier_length, 1, seed=_SEQUENCE,
                      values=True)  # fmt: skip
    n, fixed = layers[0].keys.shape[1], profile.sink + profile.local
    heavy = {max(1, int(density * n) - fixed): label(density) for density in densities}
    rows = drawing_errors(
        layers, selectors, list(heavy), (0.0, _SHARE), draws, profile.sink, profile.local,
        last=_ROWS,
    )  # fmt: skip
    table = pd.DataFrame(rows)
    table["budget"] = table["heavy"].map(heavy)
    table["reading"] = table["sampled"].map({0.0: "ranked", _SHARE: "drawn"}).fillna("its own")
    squares = table.groupby(["method", "budget", "reading"], sort=False)[
        ["squared_error", "squared_bias", "variance"]
    ].mean()
    squares.columns = ["error", "bias", "spread"]
    return squares.clip(lower=0).pow(0.5)


def drawn_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """Of fidelity's rows each drawn method against itself by rank, and against exact top-k.

    A line for every budget and pair: method, budget, against, both mean KL divergences (nats), the
    difference (drawn minus ranked, below 0: drawn is closer to dense) with its 95 % paired
    bootstrap interval over documents, and the verdict.
    """
    lines = []
    drawn = rows[rows["method"].str.contains(_DRAWN)]
    for (name, budget), part in drawn.groupby(["method", "budget"], sort=False):
        for other in dict.fromkeys([name.split(_DRAWN)[0], "oracle"]):
            ranked = rows[(rows["method"] == other) & (rows["budget"] == budget)]
            if ranked.empty:
                continue
            pairs = part.merge(ranked, on=_PAIRED, suffixes=("", " ranked"))
            difference = paired_bootstrap(pairs["kl"].tolist(), pairs["kl ranked"].tolist())
            lines.append({
                "method": name, "budget": budget, "against": other, "drawn": pairs["kl"].mean(),
                "ranked": pairs["kl ranked"].mean(), **outcome(difference, better=BELOW),
            })  # fmt: skip
    return pd.DataFrame(lines)


def drawn_claims(claims: Claims, table: pd.DataFrame, model: str) -> None:
    """What notebook 03 claims of a model's by_length table: drawn by codes beside exact top-k."""
    for tokens, part in table.groupby("tokens"):
        lines, where = part.droplevel("tokens"), f"{model}, {tokens} tokens"
        for name, bits in (("hash", 32), ("hash_64", 64)):
            for budget, share in _ASKED[name].items():
                pair = [(name + _DRAWN, budget), ("oracle", budget)]
                if set(pair) <= set(lines.index):
                    drawn, exact = (float(lines.loc[line, "kl"]) for line in pair)
                    claims.goal(f"{where}, {bits} bits, half drawn at {budget}: KL to dense over "
                                "exact top-k's (ratio)", drawn / exact, high=share)  # fmt: skip
        if (line := ("hash_64" + _DRAWN, "16x")) in lines.index:
            claims.goal(f"{where}, 64 bits, half drawn at 16x: same next token (points)",
                        float(lines.loc[line, "agreement"]), low=97.0)  # fmt: skip


def drawn_lines(axis: Axes, table: pd.DataFrame) -> None:
    """KL divergence from dense over sparsity, of fidelity_table's methods: ranked dashed, drawn
    solid, those that sample by themselves dotted."""
    sparse = table[table["density"] < 1].reset_index()
    for method, part in sparse.groupby("method", sort=False):
        style = plots.method_style(method)
        drawn, alone = _DRAWN in method, method.split()[0] in ("residual", "magicpig")
        axis.plot(
            1 / part["density"], part["kl"], color=style.color, marker=style.marker,
            linestyle="-" if drawn else ":" if alone else "--", linewidth=2 if drawn else 1,
            label=method,
        )  # fmt: skip
        axis.fill_between(1 / part["density"], part["kl_low"], part["kl_high"], alpha=0.08,
                          linewidth=0, color=style.color)  # fmt: skip
    plots.sparsity_axis(axis, 1 / sparse["density"])
    axis.set(ylabel="KL(dense || sparse), nats", yscale="log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

"""Notebook 03's fidelity to dense attention on text of several kinds, of which nothing is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from hashattn.evaluation.fidelity import fidelity_table
from hashattn.evaluation.methods import Method
from hashattn.evaluation.statistics import BELOW, paired_bootstrap
from hashattn.reproduce import plots
from hashattn.reproduce.experiments.common import answers
from hashattn.reproduce.experiments.frontier import BOUNDS, OURS, outcome
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOCUMENT = ["dataset", "sample"]


def fidelity(
    profile: Profile, model, tokenizer, methods: Iterable[Method], progress: bool = True
) -> pd.DataFrame:
    """evaluate() by fidelity (evaluation.fidelity) on the profile's documents of its kinds of
    held-out text, at its document_lengths (by default frontier_length), setup B; column tokens: the
    length. Results resume in <results>/records."""
    reading = replace(profile, benchmark="texts", tasks=profile.texts, data=None, prompt_limit=None)
    frames = []
    for length in profile.document_lengths or (profile.frontier_length,):
        frame = answers(
            reading, model, tokenizer, methods, length, profile.documents, "texts", progress,
            setups="B",
        )  # fmt: skip
        frames.append(frame.assign(tokens=length))
    return pd.concat(frames, ignore_index=True)


def by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """fidelity_table of each length, by tokens, method and budget."""
    tables = {tokens: fidelity_table(part) for tokens, part in rows.groupby("tokens")}
    return pd.concat(tables, names=["tokens"])


def by_budget(table: pd.DataFrame) -> pd.DataFrame:
    """KL divergence (nats) and agreement (points) of a by_length table, budgets side by side."""
    sparse = table[table["density"] < 1]
    budgets = dict.fromkeys(sparse.index.get_level_values("budget"))
    columns = [(measure, budget) for measure in ("kl", "agreement") for budget in budgets]
    wide = sparse[["kl", "agreement"]].unstack("budget")
    return wide.loc[sparse.index.droplevel("budget").unique(), columns]


def by_kind(rows: pd.DataFrame, budget: str) -> pd.DataFrame:
    """Mean KL divergence (nats) at one budget: lengths and methods by kinds of text."""
    part = rows[rows["budget"] == budget]
    table = part.groupby(["tokens", "method", "dataset"], sort=False)["kl"].mean().unstack()
    return table[list(dict.fromkeys(part["dataset"]))].rename_axis(columns=None)


def kl_verdicts(rows: pd.DataFrame, ours: Iterable[str]) -> pd.DataFrame:
    """Each of `ours` against every method of others, at every length and budget they share.

    A line each: codes (ours), tokens, method, its nominal bits, whether these are as many as ours
    or more, budget, both mean KL divergences (nats), their difference (ours minus theirs, below 0:
    ours is closer to dense) with its 95 % paired bootstrap interval over documents, and the
    verdict. Oracles and dense attention are left out.
    """
    lines = []
    for name in ours:
        for (tokens, method, budget), part in rows.groupby(
            ["tokens", "method", "budget"], sort=False
        ):
            mine = rows[
                (rows["method"] == name) & (rows["tokens"] == tokens) & (rows["budget"] == budget)
            ]
            if mine.empty or method.split("_")[0] in (*BOUNDS, *OURS):
                continue
            pairs = mine.merge(part, on=_DOCUMENT, suffixes=("", " theirs"))
            difference = paired_bootstrap(pairs["kl"].tolist(), pairs["kl theirs"].tolist())
            bits = part["nominal_bits"].max()
            lines.append({
                "codes": name, "tokens": tokens, "method": method, "bits": bits,
                "as_many_bits": bits >= mine["nominal_bits"].max(), "budget": budget,
                "ours": pairs["kl"].mean(), "theirs": pairs["kl theirs"].mean(),
                **outcome(difference, better=BELOW),
            })  # fmt: skip
    return pd.DataFrame(lines)


def fidelity_claims(claims: Claims, table: pd.DataFrame, model: str) -> None:
    """What notebook 03 claims of a model's by_length table: 64-bit codes beside exact top-k."""
    for tokens, part in table.groupby("tokens"):
        lines = part.droplevel("tokens")
        if not {("hash_64", "16x"), ("oracle", "16x")} <= set(lines.index):
            continue
        ours, bound = lines.loc[("hash_64", "16x")], lines.loc[("oracle", "16x")]
        where = f"{model}, {tokens} tokens, 64 bits at 16x"
        claims.goal(f"{where}: KL to dense over exact top-k's (ratio)",
                    ours["kl"] / bound["kl"], high=2.0)  # fmt: skip
        claims.goal(f"{where}: same next token, minus exact top-k (points)",
                    ours["agreement"] - bound["agreement"], low=-1.5)  # fmt: skip


def divergence_lines(axis: Axes, table: pd.DataFrame) -> None:
    """KL divergence from dense over sparsity, with its interval, of fidelity_table's methods."""
    sparse = table[table["density"] < 1].reset_index()
    sparse = sparse[~sparse["method"].isin(["window"])]
    sparse["sparsity"] = 1 / sparse["density"]
    plots.method_lines(axis, sparse, "sparsity", "kl")
    plots.method_bands(axis, sparse, "sparsity", "kl_low", "kl_high")
    plots.sparsity_axis(axis, sparse["sparsity"])
    axis.set(ylabel="KL(dense || sparse), nats", yscale="log")

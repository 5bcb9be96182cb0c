"""LongBench-style tables from evaluate()'s rows: scores by method and density, against dense."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from hashattn.evaluation.longbench_datasets import BUCKETS, bucket
from hashattn.evaluation.statistics import Difference, paired_bootstrap

POINTS = 100  # tables show scores as LongBench does, 0 to 100


def results_frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One line a sample and method. Raises ValueError when the rows mix protocols or are none."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        raise ValueError("there are no results; run evaluate() on at least one record")
    protocols = sorted(set(frame["protocol"]))
    if len(protocols) > 1:
        short = [name[:12] for name in protocols]
        raise ValueError(
            f"the results come from {len(protocols)} protocols {short}: scores of "
            "different protocols do not compare, so make one table for each"
        )
    return frame


def score_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Points by method (rows) and budget (columns), averaged over datasets."""
    means = frame.groupby(["method", "budget", "dataset"], sort=False)["score"].mean()
    return _pivot(means.groupby(level=["method", "budget"], sort=False).mean() * POINTS)


def density_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Real density by method and budget: tokens read / tokens cached over all samples."""
    sums = frame.groupby(["method", "budget"], sort=False)[["tokens_read", "tokens_cached"]].sum()
    return _pivot(sums["tokens_read"] / sums["tokens_cached"])


def dataset_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Points by (method, budget) and dataset, with the average over datasets last."""
    means = frame.groupby(["method", "budget", "dataset"], sort=False)["score"].mean() * POINTS
    table = means.unstack("dataset")
    return table.assign(average=table.mean(axis=1))


def bucket_table(frame: pd.DataFrame) -> pd.DataFrame:
    """LongBench-E: points by (method, budget) and interval of length, averaged over datasets."""
    part = frame.assign(bucket=pd.Categorical(frame["length"].map(bucket), list(BUCKETS)))
    keys = ["method", "budget", "dataset", "bucket"]
    means = part.groupby(keys, sort=False, observed=True)["score"].mean() * POINTS
    over = means.groupby(level=["method", "budget", "bucket"], sort=False, observed=True).mean()
    table = over.unstack("bucket")
    return table[[name for name in BUCKETS if name in table]]


def comparison_table(
    frame: pd.DataFrame, baseline: str = "dense", n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One line for each method and budget, with its difference to the baseline method.

    score, difference, low, high in points averaged over datasets (95 % paired bootstrap over
    contexts, since questions about one context are not independent); verdict; density and sparsity
    as read; auxiliary_bits; samples. Raises ValueError without the baseline, or when a method was
    not run on the same samples.
    """
    known = list(dict.fromkeys(frame["method"]))
    if baseline not in known:
        raise ValueError(f"baseline = {baseline!r} was not run; methods are {known}")
    reference = frame[frame["method"] == baseline].set_index("sample")
    if reference.index.has_duplicates or reference["budget"].nunique() > 1:
        reference = reference[~reference.index.duplicated()]
    lines = []
    for (method, budget), part in frame.groupby(["method", "budget"], sort=False):
        found = difference_to(part, reference, n, seed).scaled(POINTS)
        density = part["tokens_read"].sum() / part["tokens_cached"].sum()
        lines.append({
            "method": method, "budget": budget, "samples": len(part),
            "score": float((part["score"] * dataset_weights(part)).mean()) * POINTS,
            "difference": found.difference, "low": found.low, "high": found.high,
            "verdict": found.verdict, "density": density, "sparsity": 1 / density,
            "auxiliary_bits": part["auxiliary_bits"].iloc[0],
        })  # fmt: skip
    return pd.DataFrame(lines)


def difference_to(part: pd.DataFrame, reference: pd.DataFrame, n: int, seed: int) -> Difference:
    """Bootstrap of a method's scores minus the reference's (indexed by sample), 0 to 1."""
    if set(part["sample"]) != set(reference.index):
        missing = len(set(part["sample"]) ^ set(reference.index))
        raise ValueError(
            f"method {part['method'].iloc[0]!r} and the baseline differ in {missing} "
            "samples; run both on the same records"
        )
    weights = dataset_weights(part).to_numpy()
    theirs = reference["score"].loc[part["sample"]].to_numpy()
    groups = part["context"].tolist()
    return paired_bootstrap(
        part["score"].to_numpy() * weights, theirs * weights, n, seed, groups=groups
    )


def dataset_weights(part: pd.DataFrame) -> pd.Series:
    """Weights with mean 1 that make a mean over samples the mean of the datasets' means."""
    sizes = part.groupby("dataset")["score"].transform("size")
    return len(part) / (part["dataset"].nunique() * sizes)


def _pivot(series: pd.Series) -> pd.DataFrame:
    table = series.unstack("budget")
    order = list(dict.fromkeys(series.index.get_level_values("budget")))
    methods = list(dict.fromkeys(series.index.get_level_values("method")))
    return table.loc[methods, order]

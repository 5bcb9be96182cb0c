"""Notebook 03's RULER: points by task in both setups, and what is claimed of the tasks answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from hashattn.evaluation.methods import Method
from hashattn.evaluation.tables import dataset_table
from hashattn.reproduce.experiments.drawing import drawn_methods
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

INDEX = ["setup", "tokens", "method", "budget"]
_ANSWERED = 50  # points from which on dense attention answers a task
_BUDGET = "16x"
_OURS = ("hash", "hash_64", "hash_128")
_AVERAGE, _SAMPLES = "average", "samples"


def with_drawn(
    profile: Profile, methods: Iterable[Method], selectors: Mapping[str, Selector]
) -> list[Method]:
    """The methods, and at 16x those of our codes among them with half of the budget drawn."""
    methods = list(methods)
    ours = {m.name: selectors[m.name] for m in methods
            if m.name in _OURS and m.budget_label == _BUDGET}  # fmt: skip
    both = drawn_methods(profile, ours, {}, [1 / 16])
    return methods + [method for method in both if method.budget.sampled]


def ruler_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Points of `experiments.common.ruler`'s rows, a line by INDEX: a column for each task, their
    average, and the samples of each task."""
    parts = {}
    for (setup, tokens), part in frame.groupby(["setup", "tokens"]):
        counts = part.groupby(["method", "budget", "dataset"], sort=False).size()
        samples = counts.groupby(level=["method", "budget"], sort=False).min()
        parts[setup, tokens] = dataset_table(part).assign(samples=samples)
    return pd.concat(parts, names=INDEX[:2]).rename_axis(columns=None)


def answered(table: pd.DataFrame) -> pd.DataFrame:
    """Of `ruler_table`, for each setup and length the tasks of which dense attention has _ANSWERED
    points or more: their mean points by method and budget, and the difference from dense."""
    lines = []
    for (setup, tokens), part in table.groupby(["setup", "tokens"]):
        points = part.droplevel(["setup", "tokens"]).drop(columns=[_AVERAGE, _SAMPLES])
        dense = points.loc[("dense", "dense")]
        tasks = dense.index[dense >= _ANSWERED]
        for (method, budget), line in points[tasks].iterrows():
            mean = line.mean() if len(tasks) else float("nan")
            lines.append({
                "setup": setup, "tokens": tokens, "method": method, "budget": budget,
                "tasks": len(tasks), "points": mean, "minus dense": mean - dense[tasks].mean(),
            })  # fmt: skip
    return pd.DataFrame(lines).set_index(INDEX)


def ruler_claims(claims: Claims, table: pd.DataFrame, model: str, methods: list[str]) -> None:
    """Claims of `answered`'s table that methods keep what dense attention answers, at 16x."""
    for (setup, tokens), part in table.groupby(["setup", "tokens"]):
        lines = part.droplevel(["setup", "tokens"])
        for method in methods:
            if (method, _BUDGET) not in lines.index or not lines["tasks"].iloc[0]:
                continue
            claims.goal(f"{model}, RULER, {tokens} tokens, setup {setup}: {method} at {_BUDGET} "
                        "minus dense, tasks that dense answers (points)",
                        float(lines.loc[(method, _BUDGET), "minus dense"]), low=-2)  # fmt: skip

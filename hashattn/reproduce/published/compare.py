"""The paper's numbers beside ours, or the command that measures ours.

A published score and ours come from different prompts, kernels and, for hashes, trainings, on the
same questions. How far apart they may be is fixed by the published number alone, before any run:
two standard errors of a mean as high over as many samples. A score from 0 to 1 with mean v has a
variance of at most v (1 - v), so the tolerance is 2 sqrt(v (1 - v) / samples); a mean of datasets'
means has no more. Differences of two methods are paired by sample: two standard errors of ours.
Bounds (a relation other than "=") hold or do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashattn.reproduce.profiles import results_root
from hashattn.reproduce.published.measured import POINTS, Measured, Results, budget_label
from hashattn.reproduce.published.runs import OUR_METHODS, command, run_of
from hashattn.reproduce.published.table import DIFFERENCE, load_paper

if TYPE_CHECKING:
    import pandas as pd

WITHIN, ABOVE, BELOW = "within tolerance", "above", "below"
NOT_RUN = "not run here"
_ERRORS = 2  # standard errors by which ours may be off
HOLDS = {
    ">": lambda ours, value: ours > value,
    ">=": lambda ours, value: ours >= value,
    "<": lambda ours, value: ours < value,
    "<=": lambda ours, value: ours <= value,
}


def compare_with_paper(
    paper: pd.DataFrame | None = None, results: str | Path | None = None
) -> pd.DataFrame:
    """Every published number beside ours, a line for each of our methods that matches the row's.

    paper: rows of load_paper(), all by default. results: the folder of all profiles' results,
    results_root() by default.
    Columns: id, table, benchmark, dataset, model, method, budget ("16x", "512 tokens", "dense"),
    paper, unit, ours, difference (ours minus the paper's), tolerance (NaN where it needs our
    samples), verdict (within tolerance, above, below, not run here), our_method, our_bits
    (nominal bits per token and KV head), samples (ours, of all datasets) and run (the command
    that fills the line, or why there is none). Averages are means of the datasets' means: a run
    that lacks one of the row's datasets counts as not run.
    Raises PaperError when records mix protocols, hold more samples of a dataset than the paper
    scored, or have damaged lines.
    """
    import pandas as pd

    paper = load_paper() if paper is None else paper
    all_results = Results(Path(results) if results is not None else results_root())
    lines = []
    for id, row in paper.iterrows():
        run = run_of(row)
        for method in OUR_METHODS.get(row["method"], ("",)):
            ours = all_results.measured(row, run, method)
            lines.append(
                {"id": id}
                | {name: row[name] for name in ("table", "benchmark", "dataset", "model", "method")}
                | {"budget": budget_label(row), "paper": row["value"], "unit": row["unit"]}
                | judge(row, ours)
                | {
                    "our_method": method if run.profile else "",
                    "our_bits": ours.bits if ours else math.nan,
                    "samples": sum(ours.samples) if ours else 0,
                    "run": command(run.profile) if run.profile else run.reason,
                }
            )
            if run.profile is None or run.claim:
                break
    return pd.DataFrame(lines)


def judge(row: Mapping[str, Any], ours: Measured | None) -> dict[str, float | str]:
    """Columns ours, difference, tolerance and verdict of a published row."""
    value = float(row["value"])
    allowed = tolerance(row, ours)
    if ours is None:
        return {"ours": math.nan, "difference": math.nan, "tolerance": allowed, "verdict": NOT_RUN}
    gap = ours.value - value
    if row["relation"] == "=":
        inside = abs(gap) <= allowed
    else:
        inside = HOLDS[row["relation"]](ours.value, value)
    verdict = WITHIN if inside else ABOVE if gap > 0 else BELOW
    return {"ours": ours.value, "difference": gap, "tolerance": allowed, "verdict": verdict}


def tolerance(row: Mapping[str, Any], ours: Measured | None = None) -> float:
    """How far ours may be from a published number, in its unit (the formula is above); NaN where
    neither our run nor the paper's row gives the samples."""
    if row["relation"] != "=":
        return 0.0
    if row["metric"] == DIFFERENCE:
        return _ERRORS * ours.error if ours else math.nan
    if row["metric"] != "score":
        return math.nan
    sizes = ours.samples if ours else ()
    if not sizes and row["samples"] > 0 and row["datasets"] > 0:  # False for NaN
        sizes = (row["samples"],) * int(row["datasets"])
    if not sizes:
        return math.nan
    share = float(row["value"]) / POINTS
    return (
        _ERRORS * POINTS * math.sqrt(share * (1 - share) * sum(1 / n for n in sizes)) / len(sizes)
    )

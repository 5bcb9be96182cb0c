"""Whether selecting less often pays: in every few layers, or every few steps (notebook 02)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from hashattn.evaluation.benchmarks.texts import EVAL
from hashattn.evaluation.measures.reuse import reuse
from hashattn.hashing.capture import capture
from hashattn.reproduce.experiments.common import sequences
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

_STEPS = 64  # successive positions, at the end of each sequence
_SEED = 5000  # of sequences that no other measurement uses
KINDS = {"layers": (1, 2, 4), "steps": (1, 2, 4, 8)}


def reuse_rows(
    profile: Profile, model, tokenizer, selector: Selector, densities: list[float]
) -> pd.DataFrame:
    """`reuse` of every layer over the last positions of profile.sequences held-out sequences of the
    profile's frontier_length; also columns sequence and budget (the density asked for)."""
    rows, n = [], profile.frontier_length
    for number in range(profile.sequences):
        ((ids, _),) = sequences(profile, tokenizer, 1, length=n, split=EVAL, seed=_SEED + number)
        last = torch.arange(len(ids) - _STEPS, len(ids))
        layers = list(capture(model, ids, rows=last, values=True).values())
        for density in densities:
            heavy = max(1, int(density * len(ids)) - profile.sink - profile.local)
            every = sorted(set().union(*KINDS.values()))
            rows += [row | {"sequence": number, "budget": density}
                     for row in reuse(layers, selector, heavy, profile.sink, profile.local, every)
                     if row["every"] in KINDS[row["kind"]]]  # fmt: skip
    return pd.DataFrame(rows)


def reuse_table(rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    """By kind of reuse and how often is selected: overlap and output error at one budget, and how
    many times the tokens have to be read for the error of a selection of its own there (`reads`;
    infinite where the largest density measured is not enough)."""
    means = rows.groupby(["kind", "every", "budget"])[["overlap", "density", "output_error"]].mean()
    lines = {}
    for (kind, every), part in means.groupby(level=["kind", "every"]):
        part = part.droplevel(["kind", "every"]).sort_index()
        own = means.loc[(kind, 1, budget)]
        lines[kind, every] = {
            "overlap": part["overlap"][budget],
            "output_error": part["output_error"][budget],
            "reads": density_for(part, own["output_error"]) / own["density"],
        }
    table = pd.DataFrame(lines).T
    return table.rename_axis(["kind", "every"])


def density_for(part: pd.DataFrame, error: float) -> float:
    """Density at which the output error is `error`, between measured ones on logarithmic axes;
    infinite if all errors are larger."""
    ordered = part.sort_values("output_error")
    if error < ordered["output_error"].iloc[0] * (1 - 1e-9):
        return float("inf")
    logs = np.log(ordered[["output_error", "density"]].to_numpy())
    return float(np.exp(np.interp(np.log(error), logs[:, 0], logs[:, 1])))

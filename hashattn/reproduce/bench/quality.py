"""Output error of the ways that `make bench` times: their quality beside their speed.

Measured on notebook 02's sequences (hashattn.reproduce.experiments.reading); `python -m
hashattn.reproduce.bench quality` computes the record anew, in minutes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hashattn.base.repository import repository
from hashattn.reproduce.bench.ways import WAYS

FRACTIONS = (8, 16, 32, 64)
PROTOCOL = (
    "output error |o - dense| / |dense| by share of the tokens read, sink 4 and local 28 among "
    "them, on held-out sequences"
)
MODELS = {"embedded": (4096, 8192), "smollm2": (4096,)}  # profile, lengths


def path() -> Path:
    """data/reference/bench_quality.csv."""
    return repository() / "data" / "reference" / "bench_quality.csv"


def stored() -> pd.DataFrame:
    """The record: a line for each way, columns (model, "1/8") and so on; empty without one."""
    if not path().is_file():
        return pd.DataFrame(columns=pd.MultiIndex.from_tuples([], names=["model", "read"]))
    table = pd.read_csv(path())
    errors = table.pivot(index="variant", columns=["model", "read"], values="output_error")
    ways = [name for name in WAYS if name in errors.index]
    columns = [(model, f"1/{f}") for model in MODELS for f in FRACTIONS]
    return errors.reindex(index=ways, columns=pd.MultiIndex.from_tuples(columns))

"""A published number measured from the records or claims that a profile's run left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashattn.base.files import decode, parse_json, read_bytes
from hashattn.evaluation.tables import require_one_protocol
from hashattn.reproduce.notebooks.claims import NOT_JUDGED, load_claims
from hashattn.reproduce.profiles import Profile, load_profile
from hashattn.reproduce.published.runs import FULL, OUR_METHODS, Run
from hashattn.reproduce.published.table import DIFFERENCE, PaperError

if TYPE_CHECKING:
    import pandas as pd

POINTS = 100  # published scores are 0 to 100, those of records 0 to 1
SAMPLE = ["dataset", "sample"]


@dataclass(frozen=True)
class Measured:
    """One number of ours: in the published row's unit, with its standard error (differences only,
    else NaN), samples by dataset and nominal bits per token and KV head (NaN for claims)."""

    value: float
    error: float = math.nan
    samples: tuple[int, ...] = ()
    bits: float = math.nan


class Results:
    """What the runs of all profiles left, each file read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records = cache(read_records)
        self.profile = cache(load_profile)

    def measured(self, row: pd.Series, run: Run, method: str) -> Measured | None:
        """Our number for a row by one of our methods; None if it was not run, or only in part.

        Raises PaperError as compare_with_paper does.
        """
        import pandas as pd

        if run.profile is None:
            return None
        profile = self.profile(run.profile)
        folder = self.root / profile.name
        if run.claim:
            notebook, text = run.claim
            values = [c.ours for c in load_claims(folder, [notebook])
                      if c.claim == text and c.verdict != NOT_JUDGED]  # fmt: skip
            return Measured(values[0]) if values else None
        ruler = row["benchmark"] == "RULER"
        name = f"ruler_{row['length']:.0f}" if ruler else f"length_{profile.frontier_length}"
        path = folder / "records" / f"{name}.jsonl"
        frame = self.records(path)
        if frame is None:
            return None
        datasets = datasets_of(row, profile)
        lines = _lines(frame, method, budget_label(row), datasets, row, path)
        if row["metric"] != DIFFERENCE:
            _require_one_protocol(lines, path)
            return _mean(lines, datasets)
        budget = "dense" if row["minus"] == FULL else budget_label(row)
        subtracted = _lines(frame, OUR_METHODS[row["minus"]][0], budget, datasets, row, path)
        _require_one_protocol(pd.concat([lines, subtracted]), path)
        return _difference(lines, subtracted, datasets)


def budget_label(row: Mapping[str, Any]) -> str:
    """A row's budget as records name it: "dense", "16x", "512 tokens"; "" if it is not known."""
    if row["density"] == 1:
        return "dense"
    if row["density"] > 0:  # False for NaN
        return f"{1 / row['density']:g}x"
    return f"{row['heavy']:g} tokens" if row["heavy"] >= 0 else ""


def read_records(path: Path) -> pd.DataFrame | None:
    """evaluate()'s lines in a file, the last of each setup, method, budget and sample; None without
    the file. A last line that is still being written is left out; PaperError for another that is no
    JSON."""
    import pandas as pd

    if not path.is_file():
        return None
    rows = []
    for number, line in enumerate(read_bytes(path, PaperError).split(b"\n")[:-1], 1):
        where = f"{path}:{number}"
        row = parse_json(decode(line, where, PaperError, whole=number == 1), where, PaperError)
        # rows of older versions lack it; a new run answers these records again
        if isinstance(row, dict) and "protocol_fields" in row:
            rows.append(row)
    if not rows:
        return None
    cell = ["setup", "method", "budget", "dataset", "sample"]
    return pd.DataFrame(rows).drop_duplicates(cell, keep="last")


def datasets_of(row: Mapping[str, Any], profile: Profile) -> tuple[str, ...]:
    """The datasets of a row: its own, or for an average the profile's less those left out."""
    name = row["dataset"]
    if not name.startswith("average"):
        return (name,)
    without = name.partition(" without ")[2].split()
    return tuple(task for task in profile.tasks if task not in without)


def _lines(
    frame: pd.DataFrame, method: str, budget: str, datasets: tuple[str, ...],
    row: Mapping[str, Any], path: Path,
) -> pd.DataFrame:  # fmt: skip
    """A method's records for the row's datasets and setup; dense attention has only one setup."""
    part = frame[(frame["method"] == method) & (frame["budget"] == budget)]
    part = part[part["dataset"].isin(datasets)]
    if method != "dense":
        part = part[part["setup"] == (row["setup"] or "B")]
    part = part.drop_duplicates(SAMPLE, keep="last")
    sizes = part.groupby("dataset").size()
    if (sizes > row["samples"]).any():  # False for NaN, where the paper gives no number
        name = sizes.idxmax()
        raise PaperError(
            f"{path} holds {sizes[name]} samples of {name}, and the paper scored its first "
            f"{row['samples']:g}: move the file away and run the profile as it is"
        )
    return part


def _require_one_protocol(frame: pd.DataFrame, path: Path) -> None:
    """PaperError if lines of a dataset differ in protocol, or datasets in more than they may."""
    # without the setup: one was picked, and dense attention is the same in both
    fields = [{k: v for k, v in f.items() if k != "question"} for f in frame["protocol_fields"]]
    try:
        require_one_protocol(frame.assign(protocol_fields=fields))
    except ValueError as error:
        raise PaperError(
            f"{path}: {error}: move the file away and run the profile again"
        ) from error


def _mean(part: pd.DataFrame, datasets: tuple[str, ...]) -> Measured | None:
    """The mean of the datasets' means; None if one is missing."""
    groups = part.groupby("dataset")["score"]
    sizes = groups.size()
    if set(sizes.index) != set(datasets):
        return None
    return Measured(POINTS * float(groups.mean().mean()), math.nan, tuple(sizes), _bits(part))


def _difference(
    lines: pd.DataFrame, subtracted: pd.DataFrame, datasets: tuple[str, ...]
) -> Measured | None:
    """The mean of the datasets' mean differences, paired by sample, with its standard error; None
    if a dataset or half of a pair is missing, or a dataset has only one sample."""
    pairs = lines.merge(subtracted[[*SAMPLE, "score"]], on=SAMPLE, suffixes=("", " of the other"))
    gaps = (pairs["score"] - pairs["score of the other"]).groupby(pairs["dataset"])
    sizes = gaps.size()
    paired = len(pairs) == len(lines) == len(subtracted)
    if not paired or set(sizes.index) != set(datasets) or sizes.min() < 2:
        return None
    error = math.sqrt(float((gaps.var() / sizes).sum())) / len(sizes)
    return Measured(POINTS * float(gaps.mean().mean()), POINTS * error, tuple(sizes), _bits(lines))


def _bits(part: pd.DataFrame) -> float:
    return float(part["nominal_bits"].max()) if "nominal_bits" in part else math.nan

"""LongBench-style tables from evaluate()'s rows: scores by method and density, against dense.

Scores of different protocols do not compare: every table takes rows of one, and refuses others by
the fields in which they differ. A table of rows whose contexts were cut says so in attrs["cut"],
which plots.save_table prints and writes into the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from hashattn.base.checks import require_one_of
from hashattn.evaluation.benchmarks.longbench import BUCKETS, bucket
from hashattn.evaluation.protocol import BY_DATASET, SETUPS
from hashattn.evaluation.statistics import Difference, paired_bootstrap

POINTS = 100  # tables show scores as LongBench does, 0 to 100
# points that reading more than sink and local must be worth (nothing_at_stake)
_LEAST_AT_STAKE = 10


def results_frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One line for each setup, method and sample, cut_tokens 0 where nothing was cut. Raises
    ValueError without rows."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        raise ValueError("there are no results; run evaluate() on at least one record")
    return frame.assign(cut_tokens=_column(frame, "cut_tokens", 0).astype(int))


def cut_counts(frame: pd.DataFrame) -> dict[str, int]:
    """How many distinct contexts the rows have (contexts), how many the protocol's limit cut (cut),
    and how many questions lost their answer by that (answers_lost): an accepted one occurs in the
    context, but none in what was left."""
    samples = frame.drop_duplicates("sample")
    was_cut = _was_cut(samples)
    lost = _column(samples, "answer_in_context", False) & ~_column(samples, "answer_kept", False)
    return {
        "contexts": samples["context"].nunique(),
        "cut": samples["context"][was_cut].nunique(),
        "answers_lost": int((was_cut & lost).sum()),
    }


def cut_note(frame: pd.DataFrame) -> str:
    """The cut contexts of the rows in a sentence, "" without any."""
    if not _was_cut(frame).any():
        return ""
    longest = frame.loc[frame["cut_tokens"].idxmax()]
    left = longest["uncut_tokens"] - longest["cut_tokens"]
    datasets = []
    for name, part in frame.groupby("dataset", sort=False):
        counts = cut_counts(part)
        if counts["cut"]:
            text = "{} {cut} of {contexts}, answers lost {answers_lost}"
            datasets.append(text.format(name, **counts))
    return (
        f"{_cut_text(frame)}: the protocol's limit left {left:,.0f} of "
        f"{longest['uncut_tokens']:,.0f} tokens of the longest ({'; '.join(datasets)})"
    )


def _cut_text(frame: pd.DataFrame) -> str:
    text = "{cut} of {contexts} contexts were cut, {answers_lost} answers lost"
    return text.format(**cut_counts(frame))


def _was_cut(frame: pd.DataFrame) -> pd.Series:
    return _column(frame, "cut_tokens", 0) > 0


def note_cuts(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """The table, with attrs["cut"] where contexts of the frame's rows were cut."""
    if _was_cut(frame).any():
        table.attrs["cut"] = _cut_text(frame)
    return table


def _column(frame: pd.DataFrame, name: str, missing: Any) -> pd.Series:
    """A column, `missing` in rows that do not have it."""
    if name not in frame:
        return pd.Series(missing, index=frame.index)
    return frame[name].astype(object).where(frame[name].notna(), missing).astype(type(missing))


def require_one_protocol(frame: pd.DataFrame) -> None:
    """ValueError naming the fields in which the protocols of the rows differ, and their values.

    Rows of two datasets may differ in how each is asked and scored (protocol.BY_DATASET).
    """
    if "protocol_fields" not in frame:
        raise ValueError(
            "the rows do not say by which protocol they were made: take them from evaluate(); it "
            "runs again what older versions wrote"
        )
    distinct = frame.drop_duplicates(["dataset", "protocol"])
    differing = _differing(distinct["protocol_fields"], leave_out=BY_DATASET)
    for _, part in distinct.groupby("dataset", sort=False):
        differing |= _differing(part["protocol_fields"])
    if not differing:
        return
    fields = "; ".join(f"{field}: {' or '.join(values)}" for field, values in differing.items())
    advice = "take the rows of one"
    if set(differing) == {"question"}:
        advice = "take those of one setup, frame[frame.setup == 'B'], or setup_table(frame)"
    raise ValueError(
        f"the rows come from {distinct['protocol'].nunique()} protocols, which differ in {fields}. "
        f"Their scores do not compare: {advice}"
    )


def _differing(
    protocols: Iterable[dict[str, Any]], leave_out: Iterable[str] = ()
) -> dict[str, list[str]]:
    """{field: its distinct values, as text} of the fields in which protocols differ."""
    values: dict[str, dict[str, None]] = {}
    for fields in protocols:
        for name, value in fields.items():
            if name not in leave_out:
                values.setdefault(name, {})[repr(value)] = None
    return {name: list(texts) for name, texts in values.items() if len(texts) > 1}


def score_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Points by method (rows) and budget (columns), averaged over datasets; attrs["answered"] is
    {method: (rows that scored over 0, rows)}."""
    require_one_protocol(frame)
    means = frame.groupby(["method", "budget", "dataset"], sort=False)["score"].mean()
    table = _pivot(means.groupby(level=["method", "budget"], sort=False).mean() * POINTS)
    table.attrs["answered"] = {
        method: (int((part["score"] > 0).sum()), len(part))
        for method, part in frame.groupby("method", sort=False)
    }
    return note_cuts(table, frame)


def nothing_at_stake(scores: pd.DataFrame, baseline: str = "dense", floor: str = "window") -> str:
    """Why no method can be judged by these scores (score_table), in words; "" where one can.

    What a method can lose is what dense attention reaches beyond sink and local alone (counted as 0
    if not run). Below _LEAST_AT_STAKE points a method that finds nothing would seem to keep up:
    differences from dense, and between methods, are then no results.
    """
    dense = float(scores.loc[baseline].max())
    bare = float(scores.loc[floor].max()) if floor in scores.index else 0.0
    if dense - bare >= _LEAST_AT_STAKE:
        return ""
    text = f"dense attention scores {dense:.3g} points"
    if baseline in scores.attrs.get("answered", {}):
        text = "dense answers {} of {} questions, ".format(*scores.attrs["answered"][baseline])
        text += f"{dense:.3g} points"
    if not dense >= _LEAST_AT_STAKE:  # NaN too
        return f"{text}; a comparison needs {_LEAST_AT_STAKE}"
    text += f", and sink and local alone reach {bare:.3g}"
    return f"{text}; a comparison needs {_LEAST_AT_STAKE} between them"


def setup_table(frame: pd.DataFrame, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The setups side by side, by (method, budget): points averaged over datasets in each, and B
    minus A with its 95 % paired bootstrap interval over contexts (`n` resamples).

    Raises ValueError when the frame lacks a setup, or when a setup's rows mix protocols.
    """
    parts = {setup: frame[frame["setup"] == setup] for setup in SETUPS}
    missing = [setup for setup, part in parts.items() if part.empty]
    if missing:
        raise ValueError(f"the frame has no rows of setup {missing}; evaluate() runs both")
    for part in parts.values():
        require_one_protocol(part)
    lines = {}
    all_b = dict(list(parts["B"].groupby(["method", "budget"], sort=False)))
    for labels, a in parts["A"].groupby(["method", "budget"], sort=False):
        b = all_b[labels]
        delta = difference_to(b, a.set_index("sample"), n, seed).scaled(POINTS)
        scores = {"A": _points(a), "B": _points(b)}
        lines[labels] = scores | {"B - A": delta.difference, "low": delta.low, "high": delta.high}
    return note_cuts(pd.DataFrame(lines).T.rename_axis(["method", "budget"]), frame)


def sharing_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds that the rows took, and would have taken had no prefill or reading been shared.

    Lines: prefill of contexts, dense reading of questions, answers, all; columns: runs (prefills,
    readings or answers made), seconds, seconds alone, saved (the share of the latter).
    """
    lines = {}
    for name, column, shared_by in (
        ("prefill", "prefill_seconds", ["context", "prefill_seconds"]),
        ("question", "question_seconds", ["sample", "question_seconds"]),
        ("answer", "seconds", ["key"]),
    ):
        rows = frame.drop_duplicates("key")
        rows = rows[rows[column] > 0]
        once = rows.drop_duplicates(shared_by)
        lines[name] = {"runs": len(once), "seconds": once[column].sum(),
                       "seconds alone": rows[column].sum()}  # fmt: skip
    table = pd.DataFrame(lines).T
    table.loc["all"] = table.sum()
    return table.assign(saved=1 - table["seconds"] / table["seconds alone"])


def density_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Real density by method and budget: tokens read / tokens cached over all samples."""
    require_one_protocol(frame)
    sums = frame.groupby(["method", "budget"], sort=False)[["tokens_read", "tokens_cached"]].sum()
    return note_cuts(_pivot(sums["tokens_read"] / sums["tokens_cached"]), frame)


def dataset_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Points by (method, budget) and dataset, with the average over datasets last."""
    require_one_protocol(frame)
    means = frame.groupby(["method", "budget", "dataset"], sort=False)["score"].mean() * POINTS
    table = means.unstack("dataset")
    return note_cuts(table.assign(average=table.mean(axis=1)), frame)


def bucket_table(frame: pd.DataFrame) -> pd.DataFrame:
    """LongBench-E: points by (method, budget) and interval of length, averaged over datasets."""
    require_one_protocol(frame)
    part = frame.assign(bucket=pd.Categorical(frame["length"].map(bucket), list(BUCKETS)))
    keys = ["method", "budget", "dataset", "bucket"]
    means = part.groupby(keys, sort=False, observed=True)["score"].mean() * POINTS
    means = means.groupby(level=["method", "budget", "bucket"], sort=False, observed=True).mean()
    table = means.unstack("bucket")
    return note_cuts(table[[name for name in BUCKETS if name in table]], frame)


def comparison_table(
    frame: pd.DataFrame, baseline: str = "dense", n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One line for each method and budget, with its difference from the baseline method.

    score, difference, low, high in points averaged over datasets (95 % paired bootstrap over
    contexts, since questions about one context are not independent); verdict; density and sparsity
    as read; nominal_bits, what the method needs to store; samples; cut and answers_lost
    (cut_counts). Raises ValueError without the baseline, or when a method was not run on the same
    samples.
    """
    require_one_protocol(frame)
    require_one_of("baseline", baseline, dict.fromkeys(frame["method"]))
    reference = frame[frame["method"] == baseline].set_index("sample")
    if reference.index.has_duplicates or reference["budget"].nunique() > 1:
        reference = reference[~reference.index.duplicated()]
    lines = []
    for (method, budget), part in frame.groupby(["method", "budget"], sort=False):
        delta = difference_to(part, reference, n, seed).scaled(POINTS)
        density = part["tokens_read"].sum() / part["tokens_cached"].sum()
        lines.append({
            "method": method, "budget": budget, "samples": len(part),
            "score": _points(part),
            "difference": delta.difference, "low": delta.low, "high": delta.high,
            "verdict": delta.verdict, "density": density, "sparsity": 1 / density,
            "nominal_bits": part["nominal_bits"].max(),
            **{name: count for name, count in cut_counts(part).items() if name != "contexts"},
        })  # fmt: skip
    return note_cuts(pd.DataFrame(lines), frame)


def difference_to(part: pd.DataFrame, reference: pd.DataFrame, n: int, seed: int) -> Difference:
    """Bootstrap of a method's scores minus the reference's (indexed by sample), 0 to 1. ValueError
    unless both have the same samples."""
    mismatch = set(part["sample"]) ^ set(reference.index)
    if mismatch:
        raise ValueError(
            f"method {part['method'].iloc[0]!r} and the baseline differ in {len(mismatch)} "
            "samples; run both on the same records"
        )
    weights = dataset_weights(part).to_numpy()
    scores = part["score"].to_numpy() * weights
    reference_scores = reference["score"].loc[part["sample"]].to_numpy() * weights
    groups = part["context"].tolist()
    return paired_bootstrap(scores, reference_scores, n, seed, groups=groups)


def _points(part: pd.DataFrame) -> float:
    """The mean of the datasets' mean scores, 0 to 100."""
    return float((part["score"] * dataset_weights(part)).mean()) * POINTS


def dataset_weights(part: pd.DataFrame) -> pd.Series:
    """Weights with mean 1 that make a mean over samples the mean of the datasets' means."""
    sizes = part.groupby("dataset")["score"].transform("size")
    return len(part) / (part["dataset"].nunique() * sizes)


def _pivot(series: pd.Series) -> pd.DataFrame:
    table = series.unstack("budget")
    order = list(dict.fromkeys(series.index.get_level_values("budget")))
    methods = list(dict.fromkeys(series.index.get_level_values("method")))
    return table.loc[methods, order]

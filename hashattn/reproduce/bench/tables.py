"""Tables of measured rows: speed-ups with their losses, break-even lengths, the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from hashattn.reproduce.bench.step import TORCH_DENSE

SPARSE = ("hash", "hash_query_lists")
GPU_SPARSE = (*SPARSE, "hash_union")
GPU_DENSE = ("dense", "sdpa_grouped", "sdpa_gqa", "flex", "flashinfer")
_NEVER = float("nan")  # no break-even at any measured length


def totals(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of whole steps: a line per (threads, dtype, n), a column per variant."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["stage"] == "total"]
    keys = ["threads", "dtype", "n"]
    return frame.pivot_table(index=keys, columns="variant", values="ms", sort=False).sort_index()


def speedups(rows: Iterable[dict[str, Any]], variants: Iterable[str] = SPARSE) -> pd.DataFrame:
    """Each variant against the fastest torch call and against our dense step, losses included.

    A line per (threads, dtype, n): the fastest torch call and its ms, our dense step's ms, and for
    every variant its ms and both ratios (above 1: faster).
    """
    table = totals(rows)
    peers = table[[name for name in TORCH_DENSE if name in table]]
    ratios = pd.DataFrame({"torch": peers.idxmin(axis=1), "torch ms": peers.min(axis=1)})
    ratios["dense ms"] = table["dense"]
    for name in variants:
        if name in table:
            ratios[f"{name} ms"] = table[name]
            ratios[f"{name} / torch"] = ratios["torch ms"] / table[name]
            ratios[f"{name} / dense"] = table["dense"] / table[name]
    return ratios


def break_even(rows: Iterable[dict[str, Any]], variants: Iterable[str] = SPARSE) -> pd.DataFrame:
    """Shortest measured length from which a variant is never slower; NaN if there is none.

    A line per (threads, dtype, variant), columns "torch" (its fastest call) and "dense" (ours).
    """
    table = speedups(rows, variants)
    lines = []
    for (threads, dtype), part in table.groupby(level=["threads", "dtype"]):
        for name in variants:
            if f"{name} ms" not in part:
                continue
            line = {"threads": threads, "dtype": dtype, "variant": name}
            for peer in ("torch", "dense"):
                line[peer] = _won_from(part[f"{name} / {peer}"].droplevel(["threads", "dtype"]))
            lines.append(line)
    return pd.DataFrame(lines).set_index(["threads", "dtype", "variant"])


def _won_from(ratio: pd.Series) -> float:
    """The shortest length (its index) from which a ratio stays at 1 or above; NaN for none."""
    lost = ratio[ratio < 1].index
    won = ratio.index[ratio.index > (lost.max() if len(lost) else 0)]
    return won.min() if len(won) else _NEVER


def roofline(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """How close the dense and sparse steps come to the speed at which memory is read.

    A line per (threads, dtype, n): read GB/s, the share of it that the dense step reaches, and for
    each sparse variant the time of select and attend over the time to read their bytes at that
    speed; the same for reading the listed rows without computing ("gather").
    """
    frame = pd.DataFrame(rows)
    lines = []
    for (threads, dtype, n), part in frame.groupby(["threads", "dtype", "n"]):
        ms = part.set_index(["variant", "stage"])["ms"]
        size = part.set_index(["variant", "stage"])["bytes"]
        if ("read", "total") not in ms:
            continue
        speed = size["read", "total"] / ms["read", "total"]
        line = {"threads": threads, "dtype": dtype, "n": n, "read GB/s": speed / 1e6}
        line["dense share"] = ms["read", "total"] / ms["dense", "total"]
        for name in SPARSE:
            step = [(name, "select"), (name, "attend")]
            line[f"{name} / floor"] = ms[step].sum() * speed / size[step].sum()
        line["gather / floor"] = ms["gather", "total"] * speed / size["gather", "total"]
        lines.append(line)
    return pd.DataFrame(lines).set_index(["threads", "dtype", "n"])


def stages(rows: Iterable[dict[str, Any]], variant: str = "hash") -> pd.DataFrame:
    """Milliseconds of encode, select and attend, and encode over the other two."""
    frame = pd.DataFrame(rows)
    frame = frame[(frame["variant"] == variant) & (frame["stage"] != "total")]
    keys = ["threads", "dtype", "n"]
    table = frame.pivot_table(index=keys, columns="stage", values="ms")
    table = table[["encode", "select", "attend"]]
    return table.assign(**{"encode share": table["encode"] / (table["select"] + table["attend"])})


def scaling(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Speed of several threads over one: a line per (dtype, n, threads), a column per variant;
    empty where only one thread was measured."""
    table = totals(rows)
    one = table.xs(1, level="threads")
    lines = {}
    for threads in table.index.unique("threads"):
        if threads != 1:
            many = table.xs(threads, level="threads")
            for key in many.index.intersection(one.index):
                lines[*key, threads] = one.loc[key] / many.loc[key]
    ratios = pd.DataFrame(lines).T
    return ratios.rename_axis(["dtype", "n", "threads"]) if lines else ratios


def selection(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of the selection step and its peers, one list per KV head, and ratios.

    "threshold" is our threshold and compaction of the same distances as "topk"; "select" computes
    them too. "select_shared_codes" and "faiss" select for every query head from codes per KV head.
    """
    frame = pd.DataFrame(rows)
    names = ["topk", "threshold", "select_shared_codes", "faiss"]
    keys = ["threads", "dtype", "n"]
    table = totals(rows)
    table = table[[name for name in names if name in table]].copy()
    select = frame[(frame["variant"] == "hash") & (frame["stage"] == "select")]
    table["select"] = select.set_index(keys)["ms"]
    if "threshold" in table:
        table["topk / threshold"] = table["topk"] / table["threshold"]
    table["topk / select"] = table["topk"] / table["select"]
    if "faiss" in table:
        table["faiss / ours"] = table["faiss"] / table["select_shared_codes"]
    return table


def models(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Whole models: ms a token, attention's share, and the speed-up beside its ceiling.

    speed-up: over "dense", our kernel and cache, the fairer peer; "transformers" is the model as it
    comes. ceiling: the speed-up over that variant if attention took no time.
    """
    frame, keys = pd.DataFrame(rows), ["model", "threads", "n"]
    table = frame.set_index([*keys, "variant"])[["ms", "q1", "q3", "attention_share"]]
    dense = frame[frame["variant"] == "dense"].set_index(keys)["ms"]
    peer = dense.reindex(frame.set_index(keys).index).to_numpy()
    return table.assign(**{"speed-up": peer / table["ms"], "ceiling": frame["ceiling"].to_numpy()})


def model_stages(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of a layer's stages inside a model, and encode over select and attend."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["variant"] == "hash"].set_index(["model", "threads", "n"])
    table = frame[["encode_ms", "select_ms", "attend_ms"]]
    rest = table["select_ms"] + table["attend_ms"]
    return table.assign(**{"encode share": table["encode_ms"] / rest})


def gpu_speedups(record: dict[str, Any], graph: bool = True) -> pd.DataFrame:
    """Each sparse variant on a GPU over the fastest dense call of its cell, losses included.

    A line per (heads, batch, divisor, n): the fastest dense call, its ms and share of the copy
    bandwidth, and for every variant its ms and the ratio (above 1: faster). graph: CUDA graphs.
    """
    frame = pd.DataFrame(record["rows"])
    frame = frame[(frame["graph"] == graph) & (frame["stage"] == "total")]
    cell = ["heads", "batch", "n"]
    dense = frame[frame["variant"].isin(GPU_DENSE)]
    fastest = dense.loc[dense.groupby(cell)["ms"].idxmin()].set_index(cell)
    sparse = frame[frame["variant"].isin(GPU_SPARSE)]
    sparse = sparse.astype({"divisor": int})
    table = sparse.pivot_table(index=["heads", "batch", "divisor", "n"], columns="variant",
                               values="ms").sort_index()  # fmt: skip
    dense = fastest.reindex(table.reset_index().set_index(cell).index)
    speed = dense["bytes"] / dense["ms"] * 1e3
    ratios = pd.DataFrame(
        {
            "dense": dense["variant"].to_numpy(),
            "dense ms": dense["ms"].to_numpy(),
            "dense / copy": (speed / record["copy_bytes_per_second"]).to_numpy(),
        },
        index=table.index,
    )
    for name in GPU_SPARSE:
        if name in table:
            ratios[f"{name} ms"] = table[name]
            ratios[f"{name} / dense"] = ratios["dense ms"] / table[name]
    return ratios


def gpu_break_even(record: dict[str, Any]) -> pd.DataFrame:
    """Shortest measured length from which a variant is never slower than the fastest dense call, as
    CUDA graphs; NaN if there is none. A line per (heads, batch, divisor)."""
    table = gpu_speedups(record)
    names = [name for name in GPU_SPARSE if f"{name} / dense" in table]
    lines = {}
    for key, part in table.groupby(level=["heads", "batch", "divisor"]):
        part = part.droplevel(["heads", "batch", "divisor"])
        lines[key] = {name: _won_from(part[f"{name} / dense"]) for name in names}
    return pd.DataFrame(lines).T.rename_axis(["heads", "batch", "divisor"])


def gpu_stages(record: dict[str, Any]) -> pd.DataFrame:
    """Stages as CUDA graphs: microseconds, TB/s of the bytes that they must read, share of copy.

    A line per (heads, batch, n, variant, stage); "topk" is torch's, on the scores of one list per
    query head.
    """
    frame = pd.DataFrame(record["rows"])
    staged = (frame["stage"] != "total") | (frame["variant"] == "topk")
    frame = frame[frame["graph"] & staged]
    table = frame.set_index(["heads", "batch", "n", "variant", "stage"])
    speed = table["bytes"] / table["ms"] * 1e3
    return pd.DataFrame({
        "us": table["ms"] * 1e3,
        "TB/s": speed / 1e12,
        "share of copy": speed / record["copy_bytes_per_second"],
    }).sort_index()  # fmt: skip

"""Tables of measured rows: speed-ups with their losses, break-even lengths, the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from hashattn.bench.step import TORCH_DENSE

SPARSE = ("hash", "hash_query_lists")
NEVER = float("nan")  # a break-even beyond every length that was measured


def totals(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of whole steps: a line a (threads, dtype, n), a column a variant."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["stage"] == "total"]
    keys = ["threads", "dtype", "n"]
    return frame.pivot_table(index=keys, columns="variant", values="ms", sort=False).sort_index()


def speedups(rows: Iterable[dict[str, Any]], variants: Iterable[str] = SPARSE) -> pd.DataFrame:
    """Each variant against the fastest torch call and against our dense step, losses included.

    A line a (threads, dtype, n): the fastest torch call and its ms, ours, and for every variant its
    ms and both ratios (above 1: faster).
    """
    table = totals(rows)
    peers = table[[name for name in TORCH_DENSE if name in table]]
    found = pd.DataFrame({"torch": peers.idxmin(axis=1), "torch ms": peers.min(axis=1)})
    found["dense ms"] = table["dense"]
    for name in variants:
        if name in table:
            found[f"{name} ms"] = table[name]
            found[f"{name} / torch"] = found["torch ms"] / table[name]
            found[f"{name} / dense"] = table["dense"] / table[name]
    return found


def break_even(rows: Iterable[dict[str, Any]], variants: Iterable[str] = SPARSE) -> pd.DataFrame:
    """Shortest measured length from which on a variant is never slower; NaN if there is none.

    A line a (threads, dtype, variant), columns "torch" (its fastest call) and "dense" (ours).
    """
    table = speedups(rows, variants)
    lines = []
    for (threads, dtype), part in table.groupby(level=["threads", "dtype"]):
        for name in variants:
            if f"{name} ms" not in part:
                continue
            line = {"threads": threads, "dtype": dtype, "variant": name}
            for peer in ("torch", "dense"):
                ratio = part[f"{name} / {peer}"].droplevel(["threads", "dtype"]).sort_index()
                lost = ratio[ratio < 1].index
                won = ratio.index[ratio.index > (lost.max() if len(lost) else 0)]
                line[peer] = won.min() if len(won) else NEVER
            lines.append(line)
    return pd.DataFrame(lines).set_index(["threads", "dtype", "variant"])


def roofline(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """How near the dense and sparse steps come to the speed at which memory is read.

    A line a (threads, dtype, n): read GB/s, share of it that the dense step reaches, and for each
    sparse variant the time of select and attend over the time to read their bytes at that speed;
    the last also for reading the listed rows without computing ("gather").
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
    """Speed of several threads over one: a line a (dtype, n, threads), a column a variant."""
    table = totals(rows)
    one = table.xs(1, level="threads")
    lines = {}
    for threads in table.index.unique("threads"):
        if threads != 1:
            many = table.xs(threads, level="threads")
            common = many.index.intersection(one.index)
            for key in common:
                lines[*key, threads] = one.loc[key] / many.loc[key]
    return pd.DataFrame(lines).T.rename_axis(["dtype", "n", "threads"])


def selection(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of the selection step by its peers, one list per KV head, and ratios.

    "threshold" is our threshold and compaction of the very scores that "topk" sorts; "select"
    scores as well. "select_shared_codes" and "faiss" choose for every query head from codes per KV
    head.
    """
    frame = pd.DataFrame(rows)
    names = ["topk", "threshold", "select_shared_codes", "faiss"]
    keys = ["threads", "dtype", "n"]
    table = totals(rows)
    table = table[[name for name in names if name in table]].copy()
    scored = frame[(frame["variant"] == "hash") & (frame["stage"] == "select")]
    table["select"] = scored.set_index(keys)["ms"]
    if "threshold" in table:
        table["topk / threshold"] = table["topk"] / table["threshold"]
    table["topk / select"] = table["topk"] / table["select"]
    if "faiss" in table:
        table["faiss / ours"] = table["faiss"] / table["select_shared_codes"]
    return table


def models(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Whole models: ms a token, attention's share, and the speed-up beside the ceiling it allows.

    speed-up: over "dense", our kernel and cache, the fairer peer; "transformers" is the model as it
    comes. ceiling: what attention that takes no time would give over that variant.
    """
    frame, keys = pd.DataFrame(rows), ["model", "threads", "n"]
    table = frame.set_index([*keys, "variant"])[["ms", "q1", "q3", "attention_share"]]
    dense = frame[frame["variant"] == "dense"].set_index(keys)["ms"]
    ours = dense.reindex(frame.set_index(keys).index).to_numpy()
    return table.assign(**{"speed-up": ours / table["ms"], "ceiling": frame["ceiling"].to_numpy()})


def model_stages(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of a layer's stages inside of a model, and encode over select and attend."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["variant"] == "hash"].set_index(["model", "threads", "n"])
    table = frame[["encode_ms", "select_ms", "attend_ms"]]
    rest = table["select_ms"] + table["attend_ms"]
    return table.assign(**{"encode share": table["encode_ms"] / rest})

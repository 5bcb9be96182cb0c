"""Tables of measured rows: speed-ups with their losses, break-even lengths, the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from hashattn.attention.break_even import line
from hashattn.reproduce.bench.step import STAGES, TORCH_DENSE
from hashattn.reproduce.bench.ways import DEFAULT, WAYS

SPARSE = tuple(WAYS)
_FAR = (32768, 131072)  # lengths of a speed-up beside its error
GPU_SPARSE = (*SPARSE, f"{DEFAULT}_union")
GPU_DENSE = ("dense", "sdpa_grouped", "sdpa_gqa", "flex", "flashinfer")
_NEVER = float("nan")  # no break-even at any measured length


def totals(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of whole steps: a line per (threads, dtype, n), a column per variant."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["stage"] == "total"]
    keys = ["threads", "dtype", "n"]
    table = frame.pivot_table(index=keys, columns="variant", values="ms", sort=False)
    return table[list(dict.fromkeys(frame["variant"]))].sort_index()


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


def crossing(ours: tuple[float, float], theirs: tuple[float, float]) -> float:
    """The length from which a line (a, b) stays below another: 0 where it always is, NaN where it
    never does."""
    (a, b), (c, d) = ours, theirs
    if b >= d:
        return 0.0 if a <= c and b <= d else _NEVER
    return max(0.0, (a - c) / (d - b))


def fixed_costs(rows: Iterable[dict[str, Any]], variants: Iterable[str] = SPARSE) -> pd.DataFrame:
    """What a step costs at any length: a line per (threads, dtype, variant), dense ones too.

    a ms and b (microseconds for 1,024 tokens more) of the fitted `line`; at the shortest length n
    the step's ms as it is, the MB that it must read, the ms that these take at the speed at which
    memory is read, and what it takes beyond these; and from where the line stays below those of
    torch's fastest call and of our dense step.
    """
    frame, table = pd.DataFrame(rows), speedups(rows, variants)
    whole = frame[frame["stage"] == "total"].set_index(["threads", "dtype", "n", "variant"])
    found = {}
    for (threads, dtype), part in table.groupby(level=["threads", "dtype"]):
        part = part.droplevel(["threads", "dtype"])
        names = [name for name in ("torch", "dense", *variants) if f"{name} ms" in part]
        if len(part) < 2:
            continue
        fits = {name: line(part.index, part[f"{name} ms"]) for name in names}
        of_read = whole.xs((threads, dtype), level=["threads", "dtype"])
        speed = _read_speed(of_read)
        for name in names:
            n = part.index[0]
            call = part["torch"].iloc[0] if name == "torch" else name
            megabytes = of_read.loc[(n, call), "bytes"] / 1e6
            found[threads, dtype, name] = {
                "a ms": fits[name][0], "b us/1K": fits[name][1] * 1024 * 1e3, "n": n,
                "ms": part[f"{name} ms"].iloc[0], "MB": megabytes,
                "roofline ms": megabytes * 1e6 / speed,
                "above it ms": part[f"{name} ms"].iloc[0] - megabytes * 1e6 / speed,
                "below torch from": crossing(fits[name], fits["torch"]),
                "below dense from": crossing(fits[name], fits["dense"]),
            }  # fmt: skip
    return pd.DataFrame(found).T.rename_axis(["threads", "dtype", "variant"])


def _read_speed(whole: pd.DataFrame) -> float:
    """Bytes a millisecond that reading reaches at the longest length; NaN where it was not
    timed. whole: rows of whole steps by (n, variant)."""
    if "read" not in whole.index.get_level_values("variant"):
        return float("nan")
    longest = whole.xs("read", level="variant").sort_index().iloc[-1]
    return longest["bytes"] / longest["ms"]


def equal_quality(
    rows: Iterable[dict[str, Any]], errors: pd.DataFrame, dtype: str = "bfloat16",
    lengths: Sequence[int] = _FAR,
) -> pd.DataFrame:  # fmt: skip
    """Each way's speed beside its quality: speed-ups at some lengths on one thread, and `errors`
    (its output error by model and share of tokens read), by variant."""
    table = speedups(rows).xs((1, dtype), level=["threads", "dtype"])
    columns = {}
    for n in lengths:
        if n in table.index:
            for peer in ("torch", "dense"):
                columns[f"{n // 1024}K", f"over {peer}"] = {
                    name: table.loc[n, f"{name} / {peer}"]
                    for name in SPARSE
                    if f"{name} / {peer}" in table
                }
    if not columns:
        return errors
    return pd.concat([pd.DataFrame(columns).reindex(SPARSE), errors.reindex(SPARSE)], axis=1)


def roofline(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """How close the dense and sparse steps come to the speed at which memory is read.

    A line per (threads, dtype, n): read GB/s, the share of it that the dense step reaches, and for
    each way the time of its step, encoding apart, over the time to read codes and rows at that
    speed; the same for reading listed rows without computing ("gather").
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
            if step[0] in ms:
                line[f"{name} / floor"] = ms[step].sum() * speed / size[step].sum()
        if ("gather", "total") in ms:
            line["gather / floor"] = ms["gather", "total"] * speed / size["gather", "total"]
        lines.append(line)
    return pd.DataFrame(lines).set_index(["threads", "dtype", "n"])


def stages(rows: Iterable[dict[str, Any]], variant: str = DEFAULT) -> pd.DataFrame:
    """Milliseconds of encode, select and attend as one call each, encode over the other two, and
    the step in one call ("total")."""
    frame = pd.DataFrame(rows)
    frame = frame[(frame["variant"] == variant) & frame["stage"].isin((*STAGES, "total"))]
    keys = ["threads", "dtype", "n"]
    table = frame.pivot_table(index=keys, columns="stage", values="ms")
    table = table[[*STAGES, "total"]]
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
    ours = "paper_kv_lists"
    keys = ["threads", "dtype", "n"]
    table = totals(rows)
    table = table[[name for name in names if name in table]].copy()
    select = frame[(frame["variant"] == ours) & (frame["stage"] == "select")]
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


def model_host(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Milliseconds of a token in attention on a CPU: inside kernels and around them (Python, torch
    and the receipt), and the latter in microseconds a layer; of this package's variants."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["kernel_ms"].notna()].set_index(["model", "threads", "n", "variant"])
    table = frame[["ms", "attention_ms", "kernel_ms", "host_ms"]]
    return table.assign(**{"host us a layer": table["host_ms"] / frame["layers"] * 1e3})


def generated(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """`generate` on a GPU: ms a token, of these the device's and the host's, in which the device
    waits, by cache; and the speed-up over transformers' own attention with the same cache."""
    keys = ["model", "n", "cache", "variant"]
    table = pd.DataFrame(rows).set_index(keys).sort_index()
    own = table["ms"].xs("transformers", level="variant")
    peer = own.reindex(table.index.droplevel("variant")).to_numpy()
    columns = [name for name in ("ms", "q1", "q3", "device_ms", "host_ms") if name in table]
    return table[columns].assign(**{"speed-up": peer / table["ms"]})


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

"""Notebook 02's frontier: output error against density, by what a method stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from hashattn.base.engines import Engine, InProcess
from hashattn.base.engines.processes import spread
from hashattn.evaluation.benchmarks.texts import EVAL
from hashattn.evaluation.measures.allocation import allocate
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.evaluation.statistics import ABOVE, BELOW, SAME, Difference, paired_bootstrap
from hashattn.evaluation.tables import (
    dataset_weights,
    difference_to,
    note_cuts,
    require_one_protocol,
)
from hashattn.hashing.capture import CapturedLayer
from hashattn.reproduce import plots
from hashattn.reproduce.experiments.common import KEPT_BYTES, captured, text_kinds
from hashattn.reproduce.experiments.contenders import SLACK
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIANTS, LINES = "os^vDPX", ("-", "--", ":", "-.")  # markers and lines of a method's variants
_FAMILY_SEED = 4000  # seed of sequences that no other measurement of the notebooks uses
_PAIRED = ["sequence", "layer", "head"]
_CLUSTERS = 8  # sequences from which on a bootstrap draws whole ones
# tokens times selectors: fewer are measured before processes have started
_WORTH_PROCESSES = 500_000
BOUNDS = ("oracle", "dense")
# hash weights that are no size of the default's, with the method whose style they have
_OWN_LINE = {"hash signs": "hash_signs", "hash official": "hash_official"}
OURS = (
    "hash",
    "transform",
    "rerank",
    "residual",
)  # first words of this package's methods in notebook 03


def frontier(
    profile: Profile, model, tokenizer, selectors: Mapping[str, Selector], lengths: Iterable[int],
    densities: Iterable[float], shares: tuple[tuple[float, ...], ...] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """selection_metrics by KV head, with output error, of profile.sequences held-out sequences of
    every length, at densities that count sink and local tokens; also columns sequence, context,
    budget (the density asked for) and text (its kind). shares: as in Budget."""
    measure = _SequenceFrontier(profile, model, tokenizer, selectors, tuple(densities), shares)
    sequences = [(length, number) for length in lengths for number in range(profile.sequences)]
    engine: Engine = InProcess()
    if sum(length for length, _ in sequences) * len(selectors) >= _WORTH_PROCESSES:
        engine = spread(len(sequences), KEPT_BYTES, model.device)
    measured = dict(engine.run(measure, ([sequence] for sequence in sequences)))
    return pd.DataFrame([row for sequence in sequences for row in measured[sequence]])


@dataclass(frozen=True)
class _SequenceFrontier:
    """`frontier` of one sequence; picklable, for other processes."""

    profile: Profile
    model: Any
    tokenizer: Any
    selectors: Mapping[str, Selector]
    densities: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...] | None

    def __call__(
        self, sequences: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
        """(length, number) of each of the sequences, and its rows."""
        for length, number in sequences:
            yield (length, number), self._rows(length, number)

    def _rows(self, length: int, number: int) -> list[dict[str, Any]]:
        profile, seed = self.profile, _FAMILY_SEED + number
        kinds = text_kinds(profile, EVAL) or ("generated tasks",)
        layers = captured(profile, self.model, self.tokenizer, length, 1, seed=seed, values=True)
        n, fixed = layers[0].keys.shape[1], profile.sink + profile.local
        heavy = {density: max(0, int(density * n) - fixed) for density in self.densities}
        metrics = selection_metrics(
            layers, self.selectors, sorted(set(heavy.values())), profile.sink, profile.local,
            by_head=True, shares=self.shares,
        )  # fmt: skip
        return [
            row
            | {
                "sequence": number,
                "context": length,
                "budget": density,
                "text": kinds[(profile.seed + seed) % len(kinds)],
            }
            for density, tokens in heavy.items()
            for row in metrics
            if row["heavy"] == tokens
        ]


def budget_shares(
    profile: Profile, calibrated: list[CapturedLayer], selector: Selector, density: float
) -> tuple[tuple[float, ...], ...]:
    """Budget.shares of a selector, allocated at one density on the calibration sequences."""
    heavy = max(1, int(density * profile.training.length) - profile.sink - profile.local)
    return allocate(calibrated, selector, heavy, profile.sink, profile.local)


def summary(rows: pd.DataFrame, measure: str = "output_error") -> pd.DataFrame:
    """A measure's mean over all contexts, by method (with bits) and budget (columns "1/8", ...)."""
    table = rows.groupby(["method", "bits", "budget"], sort=False)[measure].mean().unstack()
    table = table[sorted(table, reverse=True)]
    return table.rename(columns=label)


def by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` of each context, by context, method and bits."""
    tables = {context: summary(part) for context, part in rows.groupby("context")}
    return pd.concat(tables, names=["context"])


def by_bits(rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Output error at one budget by context, method and bits: mean, and the ends of its 95 %
    bootstrap interval over sequences."""
    lines, part = [], rows[rows["budget"] == budget]
    for (context, method, bits), own in part.groupby(["context", "method", "bits"], sort=False):
        errors = own.groupby("sequence")["output_error"].mean().tolist()
        spread = paired_bootstrap(errors, [0.0] * len(errors))
        lines.append({
            "context": context, "method": method, "bits": bits, "sequences": len(errors),
            "output_error": spread.difference, "low": spread.low, "high": spread.high,
        })  # fmt: skip
    return pd.DataFrame(lines).set_index(["context", "method", "bits"])


def by_text(rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Mean output error at one budget, methods by kinds of text."""
    part = rows[rows["budget"] == budget]
    return part.groupby(["method", "text"], sort=False)["output_error"].mean().unstack()


def label(density: float) -> str:
    """ "1/8" for 0.125."""
    return f"1/{1 / density:g}"


def first_layer_dense(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """What a dense first layer would change: density and output error of `method` at each budget,
    as it is and with layer 0 read whole."""
    sparse = rows[rows["method"] == method]
    later = sparse["layer"] > 0
    first_dense = sparse.assign(
        output_error=sparse["output_error"].where(later, 0.0),
        density=sparse["density"].where(later, 1.0),
    )
    measures = {
        name: part.groupby("budget")[["density", "output_error"]].mean()
        for name, part in {"as it is": sparse, "first layer dense": first_dense}.items()
    }
    return pd.concat(measures, axis=1).sort_index(ascending=False).rename(index=label)


def by_head(rows: pd.DataFrame, method: str, budget: float) -> pd.DataFrame:
    """Mean output error of a method, layers by KV heads, at one budget."""
    part = rows[(rows["budget"] == budget) & (rows["method"] == method)]
    return part.groupby(["layer", "head"])["output_error"].mean().unstack()


def verdicts(rows: pd.DataFrame, ours: str) -> pd.DataFrame:
    """`ours` against every method of another family, at every context and budget.

    A line each: the other method, its bits, whether these are as many as ours or more, both mean
    output errors, their difference (ours minus theirs, below 0: ours is better) with the ends of a
    paired bootstrap interval, and the verdict: "better", "worse" or "not distinguishable". Whole
    sequences are drawn for it where there are _CLUSTERS or more; fewer say too little of their
    own spread, so sequences, layers and KV heads are drawn as independent, which is too narrow.
    Oracles and dense are left out.
    """
    our_rows = rows[rows["method"] == ours]
    our_bits = our_rows["bits"].iloc[0]
    lines = []
    for (method, context, budget), part in rows.groupby(["method", "context", "budget"]):
        family = method.split()[0]
        if family in (*BOUNDS, *OURS):
            continue
        our_part = our_rows[(our_rows["context"] == context) & (our_rows["budget"] == budget)]
        pairs = our_part.merge(part, on=_PAIRED, suffixes=("", " theirs"))
        clustered = pairs["sequence"].nunique() >= _CLUSTERS
        difference = paired_bootstrap(
            pairs["output_error"].tolist(), pairs["output_error theirs"].tolist(),
            groups=pairs["sequence"].tolist() if clustered else None,
        )  # fmt: skip
        bits = part["bits"].iloc[0]
        lines.append({
            "method": method, "bits": bits, "as_many_bits": bits >= our_bits, "context": context,
            "budget": label(budget), "ours": our_part["output_error"].mean(),
            "theirs": part["output_error"].mean(), **outcome(difference, better=BELOW),
        })  # fmt: skip
    return pd.DataFrame(lines)


def task_verdicts(results: pd.DataFrame, ours: str) -> pd.DataFrame:
    """`verdicts` for task quality, from the results of `evaluate`: `ours` against every method of
    others at each budget they share.

    Scores, difference, low and high in points averaged over datasets, from a paired bootstrap over
    contexts; above 0: ours is better. Raises ValueError where `results` mix protocols.
    """
    require_one_protocol(results)
    our_rows, lines = results[results["method"] == ours], []
    our_bits = our_rows["nominal_bits"].max()
    for (method, budget), part in results.groupby(["method", "budget"], sort=False):
        bits, our_part = part["nominal_bits"].max(), our_rows[our_rows["budget"] == budget]
        if method.split("_")[0] in (*BOUNDS, *OURS) or our_part.empty:
            continue
        difference = difference_to(our_part, part.set_index("sample"), n=2000, seed=0)
        points = [100 * (x["score"] * dataset_weights(x)).mean() for x in (our_part, part)]
        lines.append({
            "method": method, "bits": bits, "as_many_bits": bits >= our_bits, "budget": budget,
            "ours": points[0], "theirs": points[1],
            **outcome(difference.scaled(100), better=ABOVE),
        })  # fmt: skip
    return note_cuts(pd.DataFrame(lines), results)


def outcome(ours: Difference, better: str) -> dict[str, float | str]:
    """Columns of our difference from a method: itself, its interval, and our verdict; `better` is
    the side on which we win."""
    verdict = {SAME: SAME, better: "better"}.get(ours.verdict, "worse")
    return {"difference": ours.difference, "low": ours.low, "high": ours.high, "verdict": verdict}


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How often each method got each verdict."""
    table = table.groupby(["bits", "method"])["verdict"].value_counts().unstack(fill_value=0)
    return table.reindex(columns=["better", "not distinguishable", "worse"], fill_value=0)


def exceptions(table: pd.DataFrame) -> pd.DataFrame:
    """Where our codes are not better than methods of as many bits or more, from `verdicts` with a
    column "codes": a line by codes, method and bits, and in columns "worse" and SAME the contexts
    (K tokens) and budgets of each, such as "4K 1/8 1/16, 8K 1/64"."""
    rest = table[table["as_many_bits"] & (table["verdict"] != "better")]
    rest = rest.sort_values("budget", key=lambda column: column.str[2:].astype(int))

    def places(part: pd.DataFrame) -> str:
        return ", ".join(
            f"{context // 1024}K {' '.join(own['budget'])}"
            for context, own in part.groupby("context")
        )

    keys, lines = ["codes", "method", "bits"], []
    for _, own in rest.groupby("codes"):
        for key, part in own.sort_values("bits", kind="stable").groupby(keys, sort=False):
            where = {name: places(part[part["verdict"] == name]) for name in ("worse", SAME)}
            lines.append(dict(zip(keys, key, strict=True)) | where)
    return pd.DataFrame(lines, columns=[*keys, "worse", SAME]).set_index(keys)


def losses(rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame], method: str) -> str:
    """Where `method` loses, as Markdown; rows: of `frontier`; tables: verdicts by our method."""
    lines = []
    for ours, table in tables.items():
        lost = table[table["verdict"] != "better"]
        sizes = {True: "as many bits or more", False: "fewer"}
        parts = [
            f"{(part['verdict'] == 'better').sum()} of {len(part)} comparisons with methods of "
            + sizes[many]
            for many, part in sorted(table.groupby("as_many_bits"), reverse=True)
        ]
        lines.append(f"- {ours}: better in {' and '.join(parts)}.")
        for (other, bits), part in lost.groupby(["method", "bits"]):
            worse = part[part["verdict"] == "worse"]
            same = len(part) - len(worse)
            text = f"  - {other} ({bits:g} bits):"
            if len(worse):
                gap = (worse["ours"] / worse["theirs"]).max()
                where = ", ".join(f"{c // 1024}K {b}" for c, b in
                                  zip(worse["context"], worse["budget"], strict=True))  # fmt: skip
                text += f" worse in {len(worse)} ({where}), error up to {gap:.2f} times theirs;"
            lines.append(f"{text} not distinguishable in {same}.")
    errors, bound = (
        rows[rows["method"] == name].groupby("budget")["output_error"].mean()
        for name in (method, "oracle")
    )
    ends = [
        f"{errors[budget]:.3f} at {label(budget)} (oracle {bound[budget]:.3f})"
        for budget in (max(errors.index), min(errors.index))
    ]
    lines.append(f"- Tiny budgets: its mean error grows from {ends[0]} to {ends[1]}.")
    return "\n".join([*lines, _aggregation(rows, method)])


def _aggregation(rows: pd.DataFrame, method: str) -> str:
    """Errors of heads that aggregate, whose attention is spread over more tokens than the budget,
    beside those of focused heads."""
    budget = sorted(rows["budget"].unique())[len(rows["budget"].unique()) // 2]
    heads = rows[rows["budget"] == budget].set_index(["context", *_PAIRED])
    oracle, measured = (heads[heads["method"] == name] for name in ("oracle", method))
    focus = oracle["heavy_mass"].rank(pct=True)
    errors = {
        name: (measured["output_error"][quarter].mean(), oracle["output_error"][quarter].mean())
        for name, quarter in (("spread", focus <= 0.25), ("focused", focus > 0.75))
    }
    return (
        f"- Aggregation: in the quarter of heads whose attention is spread the most, at "
        f"{label(budget)} its error is {errors['spread'][0]:.3f} (oracle {errors['spread'][1]:.3f}"
        f"), in the most focused quarter {errors['focused'][0]:.3f} (oracle "
        f"{errors['focused'][1]:.3f}): what needs all tokens is lost to any top-k."
    )


def at_memory(table: pd.DataFrame, bits: int) -> list[str]:
    """Methods of `summary` for a panel: the oracle, ours, and of every other family the best that
    stores at most `bits`, plus an eighth for what pages and labels add."""
    table = table.reset_index("bits")
    table = table[table["bits"] <= SLACK * bits]
    mean = table.drop(columns="bits").mean(axis=1)
    best: dict[str, str] = {}
    for name in mean.sort_values().index:
        family = name.split()[0]
        if family not in ("oracle", "hash"):
            best.setdefault(family, name)
    ours = [name for name in (f"hash {bits} bits", "hash official") if name in table.index]
    return ["oracle", *ours, *sorted(best.values())]


def bit_lines(axis: Axes, table: pd.DataFrame) -> None:
    """Output error against stored bits, for one context of `by_bits`: of every family the best of
    each size, with its interval; the oracle as a line."""
    axis.axhline(table.xs("oracle", level="method")["output_error"].iloc[0], color="black",
                 linestyle=":", label="oracle (exact q.k)")  # fmt: skip
    table = table.reset_index()
    table["family"] = table["method"].str.split().str[0]
    table.loc[table["method"].isin(_OWN_LINE), "family"] = table["method"]
    table = table[(table["bits"] > 0) & ~table["method"].str.startswith("oracle")]
    for family, part in table.groupby("family", sort=False):
        best = part.loc[part.groupby("bits")["output_error"].idxmin()].sort_values("bits")
        style = plots.method_style(_OWN_LINE.get(family, family))
        axis.fill_between(best["bits"], best["low"], best["high"], color=style.color, alpha=0.15)
        axis.plot(best["bits"], best["output_error"], marker=style.marker, color=style.color,
                  label=style.label, linewidth=2.5 if family == "hash" else 1)  # fmt: skip
    axis.set(xlabel="stored bits per token and KV head", ylabel="output error", xscale="log",
             yscale="log")  # fmt: skip
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= table["bits"].max()]
    axis.set_xticks(sizes, sizes)
    axis.minorticks_off()
    axis.legend(fontsize=8, ncols=2)


def head_map(axis: Axes, table: pd.DataFrame) -> None:
    """A heat map of `by_head`'s table."""
    import seaborn

    seaborn.heatmap(table, annot=True, fmt=".3f", cmap="viridis", cbar=False, ax=axis)
    axis.set(xlabel="KV head", ylabel="layer")


def error_lines(axis: Axes, table: pd.DataFrame, names: Iterable[str]) -> None:
    """Output error over density for some methods of `summary`, their bits in the legend."""
    labels, drawn = list(table.columns), Counter()  # drawn: lines of each colour so far
    for name in names:
        line = table.xs(name, level="method")
        bits, style = line.index[0], plots.method_style(name)
        # variants of a method share its colour and differ by marker and line
        variant = drawn[style.color]
        drawn[style.color] += 1
        axis.plot(range(len(labels)), line.iloc[0], marker=VARIANTS[variant % len(VARIANTS)],
                  color=style.color, linestyle=LINES[variant % len(LINES)],
                  label=f"{name} ({bits:g} bits)")  # fmt: skip
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2, fontsize=8)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(xlabel="density (tokens read / tokens cached)", ylabel="output error", yscale="log")

"""Which datasets' samples, or their contexts, trained the hashes that are scored on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hashattn.evaluation.identity import context_sha256, record_sha256
from hashattn.evaluation.records import Record
from hashattn.hashing.card import trained_benchmarks
from hashattn.hashing.weights import HashWeights

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "unknown: the card does not say"
NONE = "none"
OTHERS = "other samples trained, contexts disjoint"
COUNT_ONLY = "samples trained, which of them is not told"
CONTEXTS = "contexts of scored samples trained"
SAMPLES = "scored samples trained"


def benchmarks(records: Iterable[Record]) -> dict[str, dict[str, list[str]]]:
    """What train_hash_weights(benchmarks=...) keeps in the card: for each dataset the hashes of the
    training samples and of their contexts, without repeats."""
    hashes: dict[str, dict[str, dict[str, None]]] = {}
    for record in records:
        entry = hashes.setdefault(record.dataset, {"samples": {}, "contexts": {}})
        entry["samples"][record_sha256(record)] = None
        entry["contexts"][context_sha256(record)] = None
    return {name: {part: list(t) for part, t in entry.items()} for name, entry in hashes.items()}


def contamination(
    weights: HashWeights | Mapping[str, Any], scored: pd.DataFrame | Iterable[Record | str]
) -> pd.DataFrame:
    """A line for each scored dataset: whether its samples or contexts trained the hashes.

    weights: hash weights or their card. scored: evaluate()'s results, records, or names of
    datasets. Columns: scored (samples; 0 for names), trained (samples of this dataset that trained,
    its LongBench-E form included), same_samples and same_contexts (scored samples that trained, and
    those whose context trained, under any dataset), found (one of this module's texts). A value is
    missing where the card, or a name alone, cannot tell. ValueError for a damaged card.
    """
    import pandas as pd

    card = weights.card if isinstance(weights, HashWeights) else weights
    training = trained_benchmarks(card)
    lines = {}
    for name, samples in _samples(scored).items():
        line: dict[str, Any] = {"scored": len(samples)}
        if training is None:
            lines[name] = line | {"found": UNKNOWN}
            continue
        # LongBench-E draws on the same documents
        stem = name.removesuffix("_e")
        entries = [entry for n, entry in training.items() if n.removesuffix("_e") == stem]
        line["trained"] = sum(e if isinstance(e, int) else len(e["samples"]) for e in entries)
        hashed = [entry for entry in training.values() if not isinstance(entry, int)]
        if not samples or any(isinstance(entry, int) and entry for entry in entries):
            lines[name] = line | {"found": COUNT_ONLY if line["trained"] else NONE}
            continue
        trained, contexts = (
            {sha for entry in hashed for sha in entry[part]} for part in ("samples", "contexts")
        )
        line["same_samples"] = sum(sample in trained for sample in samples)
        line["same_contexts"] = sum(context in contexts for context in samples.values())
        lines[name] = line | {"found": _verdict(line)}
    columns = ["scored", "trained", "same_samples", "same_contexts", "found"]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("dataset")
    return table.astype({name: "Int64" for name in columns[:-1]})


def _verdict(line: Mapping[str, Any]) -> str:
    if line["same_samples"]:
        return SAMPLES
    if line["same_contexts"]:
        return CONTEXTS
    return OTHERS if line["trained"] else NONE


def _samples(scored: Any) -> dict[str, dict[str, str]]:
    """{dataset: {sample's hash: its context's}}; the inner dict is empty for a bare name."""
    import pandas as pd

    samples: dict[str, dict[str, str]] = {}
    if isinstance(scored, pd.DataFrame):
        columns = (scored[name] for name in ("dataset", "sample", "context"))
        for name, sample, context in zip(*columns, strict=True):
            samples.setdefault(name, {})[sample] = context
        return samples
    for item in scored:
        entry = samples.setdefault(item if isinstance(item, str) else item.dataset, {})
        if isinstance(item, Record):
            entry[record_sha256(item)] = context_sha256(item)
    return samples

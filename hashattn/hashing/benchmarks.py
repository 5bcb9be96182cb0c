"""What a card of hash weights says of the benchmarks whose samples trained them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LISTS = ("samples", "contexts")  # SHA-256 of records and of their contexts


def benchmarks_field(benchmarks: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"benchmarks": ...} for the card's data section; {} for None: nothing is known.

    benchmarks: by dataset the number of samples that trained, or {"samples": [...], "contexts":
    [...]} with their hashes (hashattn.evaluation.contamination.benchmarks makes it from records).
    An empty mapping states that no benchmark's sample trained. ValueError for anything else.
    """
    if benchmarks is None:
        return {}
    return {"benchmarks": {name: _entry(name, entry) for name, entry in benchmarks.items()}}


def trained_benchmarks(card: Mapping[str, Any]) -> dict[str, int | dict[str, list[str]]] | None:
    """The card's benchmarks by dataset, as benchmarks_field takes them; None if it says nothing.

    ValueError for a field that is damaged."""
    found = (card.get("data") or {}).get("benchmarks")
    return None if found is None else benchmarks_field(found)["benchmarks"]


def _entry(name: str, entry: Any) -> int | dict[str, list[str]]:
    if type(entry) is int and entry >= 0:
        return entry
    if isinstance(entry, Mapping) and set(entry) == set(LISTS):
        found = {part: entry[part] for part in LISTS}
        if all(
            isinstance(part, list | tuple) and all(isinstance(text, str) for text in part)
            for part in found.values()
        ):
            return {part: list(texts) for part, texts in found.items()}
    raise ValueError(
        f"benchmarks[{name!r}] = {entry!r} must be a number of samples, or lists of hashes "
        f"{list(LISTS)}"
    )

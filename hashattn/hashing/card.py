"""What a card of hash weights says: of its model, compared with the model at hand, and of the
benchmarks whose samples trained them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.checks import is_count, is_number, require
from hashattn.models.identity import adapted_layers, base_model_record

_LISTS = ("samples", "contexts")  # SHA-256 of records and of their contexts


def differences(recorded: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """How `model` differs from a card's base_model, in words; empty for the same model.

    Warns (UserWarning) of layers whose projections could not be compared, and of a card that has
    no fingerprints of them. All processes of tensor parallelism have to call this.
    """
    actual = base_model_record(model)
    differing = [
        f"{name} {recorded[name][:12]} in the card, {actual[name][:12]} in the model"
        for name in ("config_fingerprint", "weights_fingerprint")
        if recorded.get(name) and actual[name] and recorded[name] != actual[name]
    ]
    settings = recorded.get("settings") or {}
    differing += [
        f"{name} {settings[name]!r} in the card, {value!r} in the model"
        for name, value in actual["settings"].items()
        if name in settings and settings[name] != value
    ]
    projections = recorded.get("projections") or {}
    both = projections.keys() & actual["projections"].keys()
    changed = sorted(
        int(layer) for layer in both if projections[layer] != actual["projections"][layer]
    )
    if changed:
        adapted = sorted(set(changed).intersection(adapted_layers(model)))
        cause = f"an adapter in {_layers(adapted)}" if adapted else "fine-tuned or merged adapter?"
        differing.append(f"the query and key projections or norms of {_layers(changed)} ({cause})")
    _warn_of_uncompared(recorded, actual)
    return tuple(differing)


def _warn_of_uncompared(recorded: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    if "projections" not in recorded:
        warnings.warn(
            "the card of these hash weights has no fingerprints of the model's query and key "
            "projections, so a fine-tuned model would not be noticed: add them once, with the "
            "model that the weights were trained on, by hashattn.hashing.renew_card(path, model)",
            stacklevel=5,  # the caller of HashWeights.load
        )
        return
    reasons: dict[str, list[int]] = {}
    for whose, record in (("in the card", recorded), ("in the model", actual)):
        for layer, reason in (record.get("unread") or {}).items():
            reasons.setdefault(f"{reason} {whose}", []).append(int(layer))
    if reasons:
        listed = "; ".join(f"{_layers(sorted(rows))} {why}" for why, rows in reasons.items())
        warnings.warn(
            f"query and key projections could not be compared with the card's ({listed}): make "
            "sure that this is the model the hash weights were trained on",
            stacklevel=5,
        )


def _layers(numbers: list[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def benchmarks_field(benchmarks: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"benchmarks": ...} for the card's data section; {} for None: nothing is known.

    benchmarks: by dataset the number of samples that trained, or {"samples": [...], "contexts":
    [...]} with their hashes (hashattn.evaluation.contamination.benchmarks makes it from records).
    An empty mapping states that no benchmark's sample trained. ValueError for anything else.
    """
    if benchmarks is None:
        return {}
    entries = {name: _benchmark_entry(name, entry) for name, entry in benchmarks.items()}
    return {"benchmarks": entries}


def slopes_field(slopes: Mapping[int, Tensor | None]) -> dict[str, Any]:
    """{"slopes": {layer: numbers}} for the card, of hashing.slopes.map_slopes of every layer; {}
    unless all layers have them."""
    if any(slope is None for slope in slopes.values()):
        return {}
    return {"slopes": {str(layer): slope.tolist() for layer, slope in slopes.items()}}


def kept_slopes(card: Mapping[str, Any], lists: Collection[int]) -> dict[int, Tensor] | None:
    """The card's slopes by layer, float32; None if it has none. ValueError for damaged ones: others
    than positive numbers, one for each of `lists` token lists (either number of them)."""
    stated = card.get("slopes")
    if stated is None:
        return None
    valid = isinstance(stated, Mapping) and all(
        isinstance(slopes, list)
        and len(slopes) in lists
        and all(is_number(slope) and slope > 0 for slope in slopes)
        for slopes in stated.values()
    )
    require(valid, "slopes", stated, "positive numbers by layer, one for each token list")
    return {int(layer): torch.tensor(slopes) for layer, slopes in stated.items()}


def trained_benchmarks(card: Mapping[str, Any]) -> dict[str, int | dict[str, list[str]]] | None:
    """The card's benchmarks by dataset, as benchmarks_field takes them; None if it says nothing.

    ValueError for a field that is damaged.
    """
    stated = (card.get("data") or {}).get("benchmarks")
    return None if stated is None else benchmarks_field(stated)["benchmarks"]


def _benchmark_entry(name: str, entry: Any) -> int | dict[str, list[str]]:
    if is_count(entry, 0):
        return entry
    valid = (
        isinstance(entry, Mapping)
        and set(entry) == set(_LISTS)
        and all(isinstance(hashes, list | tuple) for hashes in entry.values())
        and all(isinstance(text, str) for hashes in entry.values() for text in hashes)
    )
    allowed = f"a number of samples, or lists of hashes {list(_LISTS)}"
    require(valid, f"benchmarks[{name!r}]", entry, allowed)
    return {part: list(entry[part]) for part in _LISTS}

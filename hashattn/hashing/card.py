"""What a card of hash weights says of its model, held against the model at hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from hashattn.models.identity import adapted_layers, base_model_record


def differences(recorded: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """What `model` has otherwise than a card's base_model, in words; empty for the same model.

    Warns (UserWarning) of layers whose projections could not be compared, and of a card that has
    no fingerprints of them. All processes of tensor parallelism have to call this.
    """
    actual = base_model_record(model)
    found = [
        f"{name} {recorded[name][:12]} in the card, {actual[name][:12]} in the model"
        for name in ("config_fingerprint", "weights_fingerprint")
        if recorded.get(name) and actual[name] and recorded[name] != actual[name]
    ]
    settings = recorded.get("settings") or {}
    found += [
        f"{name} {settings[name]!r} in the card, {value!r} in the model"
        for name, value in actual["settings"].items()
        if name in settings and settings[name] != value
    ]
    projections = recorded.get("projections") or {}
    both = projections.keys() & actual["projections"].keys()
    changed = sorted(int(layer) for layer in both
                     if projections[layer] != actual["projections"][layer])  # fmt: skip
    if changed:
        adapted = sorted(set(changed).intersection(adapted_layers(model)))
        cause = f"an adapter in {_layers(adapted)}" if adapted else "fine-tuned or merged adapter?"
        found.append(f"the query and key projections or norms of {_layers(changed)} ({cause})")
    _warn_of_uncompared(recorded, actual)
    return tuple(found)


def _warn_of_uncompared(recorded: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    if "projections" not in recorded:
        warnings.warn(
            "the card of these hash weights has no fingerprints of the model's query and key "
            "projections, so a fine-tuned model would not be noticed: add them once, with the "
            "model that the weights were trained on, by hashattn.hashing.renew_card(path, model)",
            stacklevel=5,
        )
        return
    reasons: dict[str, list[int]] = {}
    for whose, record in (("in the card", recorded), ("in the model", actual)):
        for layer, reason in (record.get("unread") or {}).items():
            reasons.setdefault(f"{reason} {whose}", []).append(int(layer))
    if reasons:
        told = "; ".join(f"{_layers(sorted(rows))} {why}" for why, rows in reasons.items())
        warnings.warn(
            f"query and key projections could not be compared with the card's ({told}): make sure "
            "that this is the model the hash weights were trained on",
            stacklevel=5,
        )


def _layers(numbers: list[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"

"""Cards of older weights are brought up to date: fingerprints of the model, slopes of the maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from hashattn.base.checks import require
from hashattn.base.errors import HashWeightsError
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.card import slopes_field
from hashattn.hashing.slopes import LEAST, map_slopes
from hashattn.hashing.weight_files import write_record
from hashattn.hashing.weights import HashWeights
from hashattn.models.identity import base_model_record


def renew_slopes(
    directory: str | Path, captured: Iterable[CapturedLayer], sink: int = 4, local: int = 28
) -> HashWeights:
    """Write slopes (hashing.slopes) into the card of the hash weights in `directory`, by which
    tokens can be drawn: for weights from before training kept them.

    captured: layers of validation sequences, of the model that the weights were made for. Only
    hash_config.json is written. Returns the weights. ValueError where a layer is not captured, or
    no row of it sees enough tokens.
    """
    weights = HashWeights.load(directory)
    layers: dict[int, list[CapturedLayer]] = {}
    for layer in captured:
        layers.setdefault(layer.layer, []).append(layer)
    missing = sorted(set(weights.config.layers) - set(layers))
    require(not missing, "captured", sorted(layers), f"layers {missing} too")
    group = weights.card["recipe"]["group"]
    slopes = {
        layer: map_slopes(maps, layers[layer], group, sink, local)
        for layer, maps in weights.maps.items()
    }
    told = all(slope is not None for slope in slopes.values())
    require(told, "captured", "short", f"rows that see {LEAST * (sink + local)} tokens or more")
    weights.card.update(slopes_field(slopes))
    write_record(directory, weights.record())
    return weights


def renew_card(directory: str | Path, model: nn.Module) -> HashWeights:
    """Write the fingerprints of `model` into the card of the hash weights in `directory`.

    For cards from before projections had fingerprints, once, with the very model that the weights
    were trained on. Only hash_config.json is written; maps and their content hash stay. Returns the
    weights. Raises HashWeightsError where the card already names another model, or where `model`
    is quantised or offloaded, so that it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is what comes now
        weights = HashWeights.load(directory, model, allow_untrained=True)
    named = {k: v for k, v in (weights.card.get("base_model") or {}).items() if v is not None}
    actual = base_model_record(model)
    if actual["unread"]:
        raise HashWeightsError(
            f"the model's projections cannot be read (layer: why, {actual['unread']}): renew the "
            "card with the model loaded whole, in float32, bfloat16 or float16"
        )
    weights.card["base_model"] = actual | {k: named[k] for k in ("name", "revision") if k in named}
    write_record(directory, weights.record())
    return weights

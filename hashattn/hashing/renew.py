"""Cards from before the model's projections had fingerprints are brought up to date."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from hashattn.base.errors import HashWeightsError
from hashattn.hashing.weight_files import write_record
from hashattn.hashing.weights import HashWeights
from hashattn.models.identity import base_model_record


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

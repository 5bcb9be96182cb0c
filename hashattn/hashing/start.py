"""Hash weights that training goes on from: whether they fit, and what a card says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from hashattn.base.errors import HashWeightsError
from hashattn.hashing.maps import HashConfig
from hashattn.hashing.weights import HashWeights

_CARRIED = ("data", "recipe", "seed", "started_from")  # of the start's card, on the next one


def check_start(start: HashWeights, config: HashConfig, model: nn.Module) -> None:
    """ValueError unless maps of `config` for `model` can be initialised from `start`.

    Shapes must agree, `start` must have every layer of `config`, be trained, and for this model,
    unless it was loaded with force.
    """
    if not start.trained:
        raise ValueError(
            "start holds random-initialised hash weights: pass trained ones, or leave start out to "
            "begin where the recipe does"
        )
    expected, actual = dataclasses.asdict(config), dataclasses.asdict(start.config)
    missing = sorted(set(expected.pop("layers")) - set(actual.pop("layers")))
    if missing:
        raise ValueError(
            f"start has no maps for layers {missing}, only for {list(start.config.layers)}: train "
            "some of those (`layers`), or pass weights of every layer"
        )
    mismatch = [
        f"{name} {actual[name]!r}, not {expected[name]!r}"
        for name in expected
        if actual[name] != expected[name]
    ]
    if mismatch:
        raise ValueError(
            f"start has other shapes than asked for ({', '.join(mismatch)}): ask for the shapes in "
            "start.config, or pass weights of those asked for"
        )
    try:
        # loaded with force: it was accepted then that they are for another model
        start.check_model(model, force=bool(start.forced))
    except HashWeightsError as error:
        raise ValueError(f"start does not serve this model: {error}") from error


def start_record(start: HashWeights) -> dict[str, Any]:
    """The start's identity and how it was trained itself: sha256, data, recipe, seed, its start,
    and how its model differed, where that was accepted."""
    forced = {"forced": list(start.forced)} if start.forced else {}
    carried = {name: start.card[name] for name in _CARRIED if name in start.card}
    return {"sha256": start.sha256} | carried | forced

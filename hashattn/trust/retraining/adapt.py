"""adapt: hash weights learn recent traffic, without touching the model.

The training loop is that of `hashattn.hashing`, on queries and keys that were captured before: in
running traffic (`Reservoir`) or from texts (`captures`). A layer's new maps replace the old ones
only where they find more on held-out rows of the new domain; sequences of the old one, mixed in
(`replay`), keep what the old maps found there. Every outcome is a version in a folder (`Versions`),
and the one before stays.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hashattn.base.checks import is_number, require, require_numbers
from hashattn.base.engines import Engine
from hashattn.hashing.capture_files import load_capture
from hashattn.hashing.card import benchmarks_field, slopes_field
from hashattn.hashing.layer import TrainedLayer
from hashattn.hashing.maps import HashConfig, LayerMaps
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.run_folder import RunFolder
from hashattn.hashing.start import start_record
from hashattn.hashing.train import curves, train_layers
from hashattn.hashing.validate import selection_quality
from hashattn.hashing.weights import HashWeights
from hashattn.models.identity import base_model_record
from hashattn.trust.retraining.captures import CapturedSequence
from hashattn.trust.retraining.held_out import AdaptError, Dealt, deal
from hashattn.trust.retraining.outcome import NEW, REPLAY, Adaptation, LayerRecall
from hashattn.trust.retraining.versions import LINEAGE, Versions

_RECALL = "recall@32"


@dataclass(frozen=True)
class AdaptSettings:
    """How weights are adapted and what is asked of the outcome.

    recipe: None for the parent's own with `steps` steps at most. It may not rank by another group
    than the parent's, nor weigh labels by output, as values are not kept. go_on: train from the
    parent's maps; else from the recipe's `init`, calibrated on the new sequences and the replayed
    ones, which for transform codes is better by far: which components get bits is decided there,
    and training does not change it. least_gain: what a layer's held-out recall must rise by.
    most_lost: what recall on replayed sequences may fall by, in the mean over layers. seed: of the
    training.
    Raises ValueError naming the field.
    """

    recipe: TrainRecipe | None = None
    steps: int = 100
    go_on: bool = False
    least_gain: float = 0.005
    most_lost: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers({"steps": self.steps, "seed": self.seed}, counts={"steps": 1, "seed": 0})
        for name in ("least_gain", "most_lost"):
            value = getattr(self, name)
            valid = is_number(value) and 0 <= value < 1
            require(valid, name, value, "a share of recall from 0, below 1")


def adapt(
    model: nn.Module,
    versions: Versions,
    sequences: Iterable[CapturedSequence],
    *,
    replay: Iterable[CapturedSequence] = (),
    settings: AdaptSettings | None = None,
    note: str = "",
    benchmarks: Mapping[str, Any] | None = None,
    progress: bool = True,
    engine: Engine | None = None,
) -> Adaptation:
    """Train hash maps on captured `sequences` of a new domain, and use them where recall rises.

    replay: captured sequences of the old domain, mixed in; how many decides what each domain gets.
    Both are written to versions.path/work, one by one, and removed at the end, on errors too.
    Layers that were not captured keep their maps. note: what the sequences are, for the card;
    benchmarks: whose samples they hold, for the card too (hashing.card.benchmarks_field). engine:
    where layers are trained, as of train_hash_weights.

    A layer's maps are replaced if recall@32 on rows that only judge (retraining.held_out) rises by
    least_gain; while the mean over layers falls by more than most_lost on replayed sequences,
    the layer that loses most keeps its old maps. If any is replaced there is a new version, in use
    from then on; caches and running attachments follow with `Attachment.swap`. An interrupted call
    leaves the version in use; the same call again goes on with the layers that were finished.

    Raises AdaptError for too little to learn from, captures of another model or a recipe that the
    parent's other layers cannot be read with; HashWeightsError where the version in use is not for
    this model; VersionsError.
    """
    started, settings = time.perf_counter(), settings or AdaptSettings()
    described = {"note": note, **benchmarks_field(benchmarks)}
    parent_version = versions.current
    parent = versions.load(model, parent_version)
    recipe = _recipe(parent, settings)
    work = versions.path / "work"
    try:
        dealt = _deal(sequences, replay, work / "captured", parent.config, recipe)
        config = dataclasses.replace(parent.config, layers=dealt[NEW].layers)
        trained = _train(model, parent, config, recipe, settings, dealt, work, progress, engine)
        measured = {
            (domain, layer): (
                _recall(parent.maps[layer], layer, part.judge, recipe, model.device),
                _recall(trained[layer].maps, layer, part.judge, recipe, model.device),
            )
            for domain, part in dealt.items()
            for layer in config.layers
        }
        replaced = _decide(measured, config.layers, settings)
        recall = tuple(
            LayerRecall(layer, domain, before, new, new if layer in replaced else before)
            for (domain, layer), (before, new) in measured.items()
        )
        weights, version = parent, parent_version
        if replaced:
            new = {layer: trained[layer] for layer in replaced}
            card = _card(parent, parent_version, recipe, settings, new, dealt, recall, described)
            card["base_model"] = base_model_record(model)
            maps = {**parent.maps, **{layer: learned.maps for layer, learned in new.items()}}
            weights = HashWeights(parent.config, maps, card)
            version = versions.add(weights)
    finally:  # captured traffic does not stay
        shutil.rmtree(work / "captured", ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    by = {domain: part.by for domain, part in dealt.items()}
    seconds = time.perf_counter() - started
    return Adaptation(weights, version, parent_version, replaced, recall, by, seconds)


def recipe_of(weights: HashWeights) -> TrainRecipe:
    """The recipe that trained weights; where they were calibrated instead, the usual one of their
    kind."""
    base = TrainRecipe.default() if weights.config.folds else TrainRecipe.signs()
    stated = weights.card.get("recipe") or {}
    if not stated.get("steps"):
        return base.vary(group=stated.get("group", base.group))
    known = {field.name for field in dataclasses.fields(TrainRecipe)}
    if unknown := sorted(set(stated) - known):
        raise AdaptError(
            f"the version in use was trained by another version of hashattn, with {unknown} in its "
            "recipe: give AdaptSettings(recipe=...) of your own"
        )
    return base.vary(**stated)


def _recipe(parent: HashWeights, settings: AdaptSettings) -> TrainRecipe:
    """What trains: never in a form that the parent's other layers cannot be read in."""
    own, recipe = recipe_of(parent), settings.recipe
    if recipe is None:
        steps = min(own.steps, settings.steps)
        recipe = own.vary(steps=steps, evaluate_every=min(own.evaluate_every, -(-steps // 2)))
    if recipe.group != own.group:
        raise AdaptError(
            f"recipe.group = {recipe.group!r}: the version in use has {own.group!r}, and layers "
            "that keep their maps are read in the same form as the new ones"
        )
    if recipe.reads_values:
        raise AdaptError("recipe.weigh = 'output' needs values, which are not kept: use 'mass'")
    return recipe


def _deal(
    sequences: Iterable[CapturedSequence], replay: Iterable[CapturedSequence], folder: Path,
    config: HashConfig, recipe: TrainRecipe,
) -> dict[str, Dealt]:  # fmt: skip
    """The domains' files; without REPLAY where nothing is replayed."""
    shutil.rmtree(folder, ignore_errors=True)  # of another call, interrupted
    window = (recipe.sink, recipe.local)
    dealt = {NEW: deal(sequences, folder, config, window, NEW)}
    old = iter(replay)
    first = next(old, None)
    if first is not None:
        layers = dataclasses.replace(config, layers=dealt[NEW].layers)
        dealt[REPLAY] = deal(chain([first], old), folder, layers, window, REPLAY)
        if dealt[REPLAY].layers != layers.layers:
            raise AdaptError(f"replay sequences have layers {list(dealt[REPLAY].layers)}, the new "
                             f"ones {list(layers.layers)}: capture the same")  # fmt: skip
    return dealt


def _train(
    model: nn.Module, parent: HashWeights, config: HashConfig, recipe: TrainRecipe,
    settings: AdaptSettings, dealt: Mapping[str, Dealt], work: Path, progress: bool,
    engine: Engine | None,
) -> dict[int, TrainedLayer]:  # fmt: skip
    """The layers of config, trained on all domains together; finished ones are reused."""
    start = None
    if settings.go_on:
        maps = {layer: parent.maps[layer] for layer in config.layers}
        start = HashWeights(config, maps, parent.card)
    folder = RunFolder(
        path=work,
        captures=work / "captured",
        config=config,
        recipe=recipe,
        seed=settings.seed,
        inputs={"parent": parent.sha256, "data": {name: d.record for name, d in dealt.items()}},
        start_sha256=None if start is None else start.sha256,
    )
    train = [path for part in dealt.values() for path in part.train]
    choose = [path for part in dealt.values() for path in part.choose]
    return train_layers(
        folder, train, choose, start=start, device=model.device, progress=progress, engine=engine
    )


def _recall(
    maps: LayerMaps, layer: int, files: Sequence[Path], recipe: TrainRecipe, device: torch.device
) -> float:
    captures = [load_capture(path, layer, device) for path in files]
    quality = selection_quality(
        maps.to(device), captures, sink=recipe.sink, local=recipe.local,
        fraction=recipe.selection_fraction, group=recipe.group,
    )  # fmt: skip
    return quality[_RECALL]


def _decide(
    measured: Mapping[tuple[str, int], tuple[float, float]], layers: Sequence[int],
    settings: AdaptSettings,
) -> tuple[int, ...]:  # fmt: skip
    """The layers to replace; measured: recall before and after training by domain and layer."""

    def gain(domain: str, layer: int) -> float:
        before, after = measured[domain, layer]
        return after - before

    replaced = [layer for layer in layers if gain(NEW, layer) > settings.least_gain]
    if any(domain == REPLAY for domain, _ in measured):
        replaced.sort(key=lambda layer: gain(REPLAY, layer), reverse=True)
        while -sum(gain(REPLAY, layer) for layer in replaced) > settings.most_lost * len(layers):
            replaced.pop()
    return tuple(sorted(replaced))


def _card(
    parent: HashWeights, parent_version: str, recipe: TrainRecipe, settings: AdaptSettings,
    new: Mapping[int, TrainedLayer], dealt: Mapping[str, Dealt], recall: Sequence[LayerRecall],
    described: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Of the new version: `started_from` has the parent's own data and recipe, and so on back."""
    kept = {layer: None for layer in parent.config.layers} | (parent.slopes or {})
    slopes = kept | {layer: trained.slopes for layer, trained in new.items()}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "trained": True,
        "seed": settings.seed,
        "recipe": dataclasses.asdict(recipe),
        "validation": (parent.card.get("validation") or {}) | curves(new),
        **slopes_field(dict(sorted(slopes.items()))),
        "data": {**described, **{domain: part.record for domain, part in dealt.items()}},
        "started_from": start_record(parent),
        LINEAGE: {
            "parent": parent.sha256,
            "parent_version": parent_version,
            "when": when,
            "layers": sorted(new),
            "go_on": settings.go_on,
            "recall": [dataclasses.asdict(row) for row in recall],
        },
    }

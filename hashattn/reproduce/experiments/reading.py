"""Output error of the ways to choose tokens that `make bench` times, by share of the tokens read.

`python -m hashattn.reproduce.bench quality` writes the record that the bench shows beside speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch

from hashattn.evaluation.measures.selection import (
    ROWS_AT_ONCE,
    Truth,
    rows_with_candidates,
    stored_keys,
)
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.bench import quality
from hashattn.reproduce.bench.ways import WAYS, Way
from hashattn.reproduce.experiments.common import captured, shipped_variant
from hashattn.reproduce.profiles import Profile, load_profile
from hashattn.selectors.base import Selector
from hashattn.selectors.hash import HashSelector

_SEED = 4000  # of sequences that notebook 02's frontier measures too


def write_record(path: Path, progress: bool = True) -> pd.DataFrame:
    """Measure every model of quality.MODELS with its shipped hash weights and write the table."""
    parts = []
    for name, lengths in quality.MODELS.items():
        profile = load_profile(name)
        model, tokenizer = load_model(profile)
        selectors = _selectors(profile, model)
        errors = defaultdict(list)
        for length in lengths:
            for number in range(profile.sequences):
                if progress:
                    print(f"{name}, {length} tokens, sequence {number}", flush=True)
                layers = captured(profile, model, tokenizer, length, 1, seed=_SEED + number,
                                  values=True)  # fmt: skip
                window = profile.sink, profile.local
                for key, values in output_errors(layers, selectors, window).items():
                    errors[key] += values
        for (variant, fraction), values in errors.items():
            parts.append({
                "model": name, "variant": variant, "read": f"1/{fraction}",
                "output_error": sum(values) / len(values), "sequences": profile.sequences,
                "lengths": " ".join(map(str, lengths)),
            })  # fmt: skip
    table = pd.DataFrame(parts)
    table.to_csv(path, index=False, float_format="%.6g")
    return table


def _selectors(profile: Profile, model) -> dict[str, Selector]:
    """The ways whose weights come with the model."""
    found = {}
    for name, way in WAYS.items():
        weights = _weights(profile, model, way)
        if weights is not None:
            found[name] = HashSelector(weights, way.scoring, way.layout)
    return found


def _weights(profile: Profile, model, way: Way) -> HashWeights | None:
    folder = profile.hash_weights_path
    if way.scoring == "hamming":
        folder = shipped_variant(profile, "signs")
    elif way.bits != profile.training.bits:
        folder = shipped_variant(profile, f"{way.bits}_bits")
    return HashWeights.load(folder, model) if folder else None


@torch.no_grad()
def output_errors(
    layers: Iterable[CapturedLayer], selectors: Mapping[str, Selector], window: tuple[int, int],
    fractions: Iterable[int] = quality.FRACTIONS, ways: Mapping[str, Way] = WAYS,
) -> dict[tuple[str, int], list[float]]:  # fmt: skip
    """{(way, fraction): mean relative output error of each layer} where 1 / fraction of the n
    captured tokens is read, sink and local ones (`window`) among them."""
    errors = defaultdict(list)
    for layer in layers:
        heavy = {f: max(0, layer.keys.shape[1] // f - sum(window)) for f in fractions}
        index = {name: stored_keys(selector, layer, 0) for name, selector in selectors.items()}
        parts = defaultdict(list)
        for rows in rows_with_candidates(layer, *window).split(ROWS_AT_ONCE):
            truth = Truth(layer, rows, window, (1,), None)
            for name, selector in selectors.items():
                scores = truth.scores(selector, index[name])
                for fraction, tokens in heavy.items():
                    read = truth.read(selector, index[name], scores, tokens, ways[name].sampled)
                    parts[name, fraction].append(truth.measure(*read)["output_error"])
        for key, found in parts.items():
            errors[key].append(float(torch.cat(found, dim=-1).mean()))
    return dict(errors)

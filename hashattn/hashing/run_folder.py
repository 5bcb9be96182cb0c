"""What a training keeps on disk, so that it goes on after an interruption where it stopped.

    layers/layer_003.safetensors, .json     a trained layer; its curve, and the key it is reused by
    captured/<key>/sequence_00012.safetensors      queries and keys of a sequence, until the end

Each file is written atomically, so what is there is whole. A key stands for everything that decides
the content: with other settings, or another version of the code, nothing is found and everything
is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from hashattn.base.errors import HashWeightsError
from hashattn.base.files import FileError, read_json, write_json
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.hashing.capture_files import CAPTURE_FORMAT
from hashattn.hashing.layer import TrainedLayer
from hashattn.hashing.maps import HashConfig, LayerMaps
from hashattn.hashing.recipe import TrainRecipe

_CODE_VERSION = 4  # raise when training changes, so that old layers are not reused


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The files of one training.

    path: where layers are kept. captures: where captured sequences are, in a folder for each key,
    as other trainings may keep theirs there. inputs: model, sequences and chunk, as JSON has them.
    start_sha256: of the weights that training goes on from, if any.
    """

    path: Path
    captures: Path
    config: HashConfig
    recipe: TrainRecipe
    seed: int
    inputs: dict[str, Any]
    start_sha256: str | None

    @property
    def layer_key(self) -> str:
        """Identity of everything that decides a layer's weights."""
        shapes = self.config.record()
        del shapes["layers"]  # a layer learns alone, so which others do does not matter
        # appended only where there is one: the keys of trainings without a start stay what they are
        start = [] if self.start_sha256 is None else [self.start_sha256]
        recipe = dataclasses.asdict(self.recipe)
        return _digest([_CODE_VERSION, self.inputs, shapes, recipe, self.seed, *start])

    @property
    def capture_folder(self) -> Path:
        """Where this training's captured sequences are; the recipe matters in what it reads."""
        reads = [self.config.layers, self.recipe.reads_values]
        return self.captures / _digest([CAPTURE_FORMAT, self.inputs, *reads])[:16]

    def sequence_file(self, number: int) -> Path:
        """The captured queries and keys of a sequence (capture_files), there or not."""
        return self.capture_folder / f"sequence_{number:05d}.safetensors"

    def finished_layers(self) -> dict[int, TrainedLayer]:
        """Layers that a training with the same settings finished.

        HashWeightsError for a layer whose tensors are damaged, naming what to delete.
        """
        finished = {}
        for layer in self.config.layers:
            maps_file, record_file = self._layer_files(layer)
            record = _read_record(record_file)
            if record.get("key") == self.layer_key:
                remedy = f"delete {record_file} to train the layer again"
                tensors = read_tensors(maps_file, HashWeightsError, remedy)
                maps = LayerMaps.from_tensors(tensors, self.config)
                slopes = record.get("slopes")
                slopes = None if slopes is None else torch.tensor(slopes)
                finished[layer] = TrainedLayer(maps, record["history"], slopes)
        return finished

    def keep(self, layer: int, trained: TrainedLayer) -> None:
        """Write a trained layer down."""
        maps_file, record_file = self._layer_files(layer)
        write_tensors(maps_file, dict(trained.maps.tensors()))
        # last: a layer with a record has its maps
        slopes = None if trained.slopes is None else trained.slopes.tolist()
        record = {"key": self.layer_key, "history": trained.history, "slopes": slopes}
        write_json(record_file, record)

    def _layer_files(self, layer: int) -> tuple[Path, Path]:
        maps_file = self.path / "layers" / f"layer_{layer:03d}.safetensors"
        return maps_file, maps_file.with_suffix(".json")


def _read_record(path: Path) -> dict[str, Any]:
    """A layer's record, empty where it is missing or damaged: the layer is then trained again."""
    try:
        record = read_json(path)
    except FileError:
        return {}
    return record if isinstance(record, dict) else {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

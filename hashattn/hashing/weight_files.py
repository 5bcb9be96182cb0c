"""The two files of hash weights: written atomically, refused wherever they are not whole.

A directory holds `hash_maps.safetensors` (names "layers.3.key.0.weight"; bfloat16 where that is
exact, else float32) and `hash_config.json` (shapes, card, content hash).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn.base.errors import HashWeightsError
from hashattn.base.files import FileError, read_json, write_json
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.hashing.maps import HashConfig, LayerMaps, expected_shapes

FORMAT_VERSION = 1
MAPS_FILE, CONFIG_FILE = "hash_maps.safetensors", "hash_config.json"
TRAIN_HINT = "train them with hashattn.hashing.train_hash_weights"


def write_weights(
    directory: str | Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write tensors (HashWeights.tensors) and their record (HashWeights.record)."""
    write_tensors(Path(directory) / MAPS_FILE, _compact(tensors))
    # last: a directory with a record has its maps, whenever the writer is killed
    write_record(directory, record)


def write_record(directory: str | Path, record: Mapping[str, Any]) -> None:
    """Write hash_config.json alone."""
    write_json(Path(directory) / CONFIG_FILE, record)


def read_weights(
    directory: str | Path,
) -> tuple[HashConfig, dict[int, LayerMaps], dict[str, Any]]:
    """Shapes, maps by layer (float32) and the record.

    HashWeightsError for missing, truncated or malformed files, tensors of other names or shapes
    than the record says, and NaN or infinite values. The content hash is not compared.
    """
    directory = Path(directory)
    record = _read_record(directory)
    config = _parse_config(record, directory)
    path = directory / MAPS_FILE
    stored = read_tensors(path, HashWeightsError, TRAIN_HINT)
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    _check_tensors(tensors, config, path)
    maps = {
        layer: LayerMaps.from_tensors(_of_layer(tensors, layer), config) for layer in config.layers
    }
    return config, maps, record


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise HashWeightsError(
            f"{path} does not exist: point to a directory written by "
            f"HashWeights.save, or {TRAIN_HINT}"
        )
    try:
        record = read_json(path)
    except FileError as error:
        raise HashWeightsError(
            f"{path} is not readable JSON ({error}): copy it again, or {TRAIN_HINT}"
        ) from error
    expected = {"format_version", "sha256", "config", "card"}
    if not isinstance(record, dict) or not expected <= set(record):
        raise HashWeightsError(
            f"{path} lacks some of {sorted(expected)}: it was not written by "
            f"HashWeights.save; {TRAIN_HINT}"
        )
    if record["format_version"] != FORMAT_VERSION:
        raise HashWeightsError(
            f"{path} has format {record['format_version']!r}, this hashattn "
            f"reads {FORMAT_VERSION}: install the hashattn that wrote it"
        )
    return record


def _parse_config(record: Mapping[str, Any], directory: Path) -> HashConfig:
    try:
        return HashConfig(**record["config"])
    except (TypeError, ValueError) as error:
        raise HashWeightsError(
            f"{directory / CONFIG_FILE} describes impossible hash maps "
            f"({error}): copy it again, or {TRAIN_HINT}"
        ) from error


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rounded weights at half the bytes: a tensor that bfloat16 holds exactly is stored as such."""
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    return {
        name: halved[name] if torch.equal(halved[name].float(), tensor) else tensor
        for name, tensor in tensors.items()
    }


def _of_layer(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"layers.{layer}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _check_tensors(tensors: Mapping[str, Tensor], config: HashConfig, path: Path) -> None:
    """Names, shapes and finite values; HashWeightsError with the first thing that is wrong."""
    expected = {
        f"layers.{layer}.{name}": shape
        for layer in config.layers
        for name, shape in expected_shapes(config).items()
    }
    mismatched = sorted(set(expected) ^ set(tensors))
    if mismatched:
        raise HashWeightsError(
            f"{path} and {CONFIG_FILE} disagree on tensors {mismatched[:3]} "
            f"({len(mismatched)} in all): copy both files again, or {TRAIN_HINT}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise HashWeightsError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, "
                f"{CONFIG_FILE} says {shape}: copy both files again, or "
                f"{TRAIN_HINT}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise HashWeightsError(
                f"{path}: {name} holds NaN or infinite values, so its codes "
                f"are meaningless: {TRAIN_HINT}"
            )

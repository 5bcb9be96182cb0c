"""Hash weights of a model: maps of every layer, the card that says how they came about, and files.

A directory holds `hash_maps.safetensors` (names "layers.3.key.0.weight"; bfloat16 where that is
exact, else float32) and `hash_config.json` (shapes, card, content hash). Loading refuses whatever
would give codes that look right and mean nothing: damaged files, wrong shapes, other models,
untrained maps.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.errors import HashWeightsError
from hashattn.base.files import FileError, read_json, write_json
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.hashing.card import differences
from hashattn.hashing.maps import HashConfig, LayerMaps, expected_shapes, random_maps
from hashattn.models.heads import HeadSlice
from hashattn.models.identity import base_model_record, model_name
from hashattn.models.structure import attention_shapes, head_slice, require_full_attention

FORMAT_VERSION = 1
MAPS_FILE, CONFIG_FILE = "hash_maps.safetensors", "hash_config.json"
TRAIN_HINT = "train them with hashattn.hashing.train_hash_weights"


class HashWeights:
    """All hash maps of a model.

    config: shapes. maps: LayerMaps by model layer. card: base model, training data, recipe,
    validation, seeds, format_version and `trained`. forced: how the model they were loaded for
    differs from theirs, where load(force=True) accepted it; receipts say so. Maps follow the device
    of what they encode.
    """

    forced: tuple[str, ...] = ()

    def __init__(
        self, config: HashConfig, maps: Mapping[int, LayerMaps], card: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.maps = {layer: maps[layer] for layer in config.layers}
        self.card = {
            "format_version": FORMAT_VERSION,
            "trained": False,
            **copy.deepcopy(dict(card)),
        }
        self._placed: dict[tuple[int, str], LayerMaps] = {}
        self._sha256 = content_hash(config, self.tensors())

    @property
    def trained(self) -> bool:
        """False for random-initialised maps."""
        return bool(self.card["trained"])

    @property
    def sha256(self) -> str:
        """Hash of shapes and tensors (not of the card): the identity of the codes."""
        return self._sha256

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        return {
            f"layers.{layer}.{name}": tensor
            for layer, maps in self.maps.items()
            for name, tensor in maps.tensors()
        }

    def layer(self, layer: int, device: torch.device | str) -> LayerMaps:
        """The maps of a layer on a device, copied there once. ValueError for an unknown layer."""
        if layer not in self.maps:
            raise ValueError(
                f"layer {layer} has no hash maps: they exist for layers "
                f"{list(self.config.layers)}; make the others dense"
            )
        place = (layer, str(device))
        if place not in self._placed:
            self._placed[place] = self.maps[layer].to(device)
        return self._placed[place]

    def preactivations_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Post-RoPE keys (B, Hkv, n, D) to (B, Hkv or Hq, n, bits) float32."""
        self._check(keys, self.config.kv_heads, "keys")
        return self.layer(layer, keys.device).preactivations_keys(keys)

    def preactivations_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Post-RoPE queries (B, Hq, q, D) to (B, Hq, q, bits) float32."""
        self._check(queries, self.config.query_heads, "queries")
        return self.layer(layer, queries.device).preactivations_queries(queries)

    @torch.no_grad()
    def encode_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Post-RoPE keys (B, Hkv, n, D) to codes (B, Hkv or Hq, n, words) int32."""
        self._check(keys, self.config.kv_heads, "keys")
        return self.layer(layer, keys.device).encode_keys(keys)

    @torch.no_grad()
    def encode_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Post-RoPE queries (B, Hq, q, D) to codes (B, Hq, q, words) int32."""
        self._check(queries, self.config.query_heads, "queries")
        return self.layer(layer, queries.device).encode_queries(queries)

    def _check(self, x: Tensor, heads: int, name: str) -> None:
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != self.config.head_dim:
            raise ValueError(
                f"{name} have shape {tuple(x.shape)}: these hash weights expect "
                f"(batch, {heads}, tokens, {self.config.head_dim})"
            )

    def to(self, device: torch.device | str) -> HashWeights:
        """The same weights with every map on `device`."""
        moved = {layer: maps.to(device) for layer, maps in self.maps.items()}
        return self._with(moved)

    def rounded(self) -> HashWeights:
        """The same weights rounded to bfloat16: half the bytes to read for every token's codes."""
        return self._with({layer: maps.rounded() for layer, maps in self.maps.items()})

    def shard(self, part: HeadSlice) -> HashWeights:
        """The maps of a part of the heads, for a process that holds no others.

        attach does this by itself (`Selector.shard`). ValueError for a model of other heads.
        """
        config = dataclasses.replace(
            self.config,
            query_heads=len(part.query),
            kv_heads=len(part.kv),
        )
        maps = {layer: maps.shard(part) for layer, maps in self.maps.items()}
        return self._with(maps, config)

    def _with(self, maps: Mapping[int, LayerMaps], config: HashConfig | None = None) -> HashWeights:
        """These weights, by card and model, with other maps."""
        weights = HashWeights(config or self.config, maps, self.card)
        weights.forced = self.forced
        return weights

    def record(self) -> dict[str, Any]:
        """The content of hash_config.json."""
        return {
            "model_type": "hashattn",
            "format_version": FORMAT_VERSION,
            "sha256": self.sha256,
            "config": dataclasses.asdict(self.config),
            "card": self.card,
        }

    def save(self, directory: str | Path) -> None:
        """Write both files, each atomically; the config last, so that it never precedes maps."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / MAPS_FILE, _compact(self.tensors()))
        write_json(directory / CONFIG_FILE, self.record())

    @classmethod
    def load(
        cls,
        directory: str | Path,
        model: nn.Module | None = None,
        *,
        allow_untrained: bool = False,
        force: bool = False,
    ) -> HashWeights:
        """Read weights and check them, against `model` too if given.

        force accepts a model of the same shapes that is not the one they were trained on, such as a
        fine-tuned one; how it differs is kept in `forced` and in every receipt. Codes may rank
        worse there: measure it, or train on (train_hash_weights with `start`).

        They are those of all heads, also for a model under tensor parallelism, of which this
        process holds some: attach takes the part. There all processes have to load with `model`.

        Raises HashWeightsError for missing, truncated, altered or malformed files, wrong shapes,
        NaN or infinite values, another model than they were trained on (unless force), a model
        whose query or key projections, norms or RoPE settings differ included, and untrained
        weights (unless allow_untrained). Warns of projections that could not be compared, because
        of an old card (see renew_card), offloading or quantisation. UnsupportedModelError for a
        model whose KV heads the processes of tensor parallelism cannot share evenly.
        """
        if force and model is None:
            raise ValueError(
                "force=True accepts a model: HashWeights.load(path, model, force=True)"
            )
        directory = Path(directory)
        record = _read_config(directory)
        config = _parse_config(record, directory)
        path = directory / MAPS_FILE
        tensors = {
            name: t.float() for name, t in read_tensors(path, HashWeightsError, TRAIN_HINT).items()
        }
        _check_tensors(tensors, config, path)
        maps = {
            layer: LayerMaps.from_tensors(_of_layer(tensors, layer), config)
            for layer in config.layers
        }
        weights = cls(config, maps, record["card"])
        if weights.sha256 != record["sha256"]:
            raise HashWeightsError(
                f"{path} does not match the content hash in {CONFIG_FILE}: the "
                f"files were altered or belong to different weights; copy both "
                f"files again or {TRAIN_HINT}"
            )
        if not weights.trained and not allow_untrained:
            raise HashWeightsError(
                f"the hash weights in {directory} are random-initialised: "
                f"{TRAIN_HINT}, or pass allow_untrained=True to use them anyway"
            )
        if model is not None:
            weights.forced = weights.check_model(model, force=force)
        return weights

    def check_model(self, model: nn.Module, *, force: bool = False) -> tuple[str, ...]:
        """Raise HashWeightsError unless these weights fit `model` and were made for it.

        force: that they fit is enough. Returns how `model` differs from theirs, in words.
        """
        head_slice(model)  # before any work, if the heads cannot be shared
        shapes = attention_shapes(model)
        for name in ("query_heads", "kv_heads", "head_dim"):
            if getattr(self.config, name) != shapes[name]:
                raise HashWeightsError(
                    f"these hash weights have {name} {getattr(self.config, name)}, the model has "
                    f"{shapes[name]}: load the weights trained for this model, or {TRAIN_HINT}"
                )
        outside = [i for i in self.config.layers if i not in shapes["layers"]]
        if outside:
            raise HashWeightsError(
                f"these hash weights have maps for layers {outside}, which are "
                f"not full-attention layers of this model: {TRAIN_HINT}"
            )
        recorded = self.card.get("base_model") or {}
        found = differences(recorded, model)
        if found and not force:
            raise HashWeightsError(
                f"these hash weights were made for {recorded.get('name') or 'another model'}, the "
                f"model at hand ({model_name(model) or 'unnamed'}) differs in {'; '.join(found)}. "
                f"Load that model, or {TRAIN_HINT}. HashWeights.load(path, model, force=True) "
                "accepts these all the same: for use, which every receipt will say, or as the "
                "`start` of training"
            )
        return found

    @classmethod
    def random(cls, config: HashConfig, seed: int) -> HashWeights:
        """Untrained maps, for tests and controls; attach refuses them unless told otherwise."""
        generator = torch.Generator().manual_seed(seed)
        maps = {layer: random_maps(config, generator) for layer in config.layers}
        return cls(config, maps, {"seed": seed, "trained": False})

    @classmethod
    def for_model(cls, model: nn.Module, *, seed: int = 0, **fields: Any) -> HashWeights:
        """Untrained maps with the shapes of `model`; `fields` as in HashConfig."""
        weights = cls.random(config_for(model, **fields), seed)
        return cls(
            weights.config, weights.maps, {**weights.card, "base_model": base_model_record(model)}
        )


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
    write_json(Path(directory) / CONFIG_FILE, weights.record())
    return weights


def config_for(
    model: nn.Module, *, layers: Collection[int] | None = None, **fields: Any
) -> HashConfig:
    """HashConfig with the model's shapes; all full-attention layers unless `layers` is given.

    ValueError for other layers, UnsupportedModelError for a model without full attention.
    """
    require_full_attention(model)
    shapes = attention_shapes(model)
    outside = sorted(set(layers or ()) - set(shapes["layers"]))
    if outside:
        raise ValueError(
            f"layers={outside} are not full-attention layers of this model: use some "
            f"of {list(shapes['layers'])}"
        )
    return HashConfig(**{**shapes, **fields, "layers": tuple(layers or shapes["layers"])})


def content_hash(config: HashConfig, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over shapes, names and float32 bytes, independent of device and file format."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_config(directory: Path) -> dict[str, Any]:
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
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        raise HashWeightsError(
            f"{path} and {CONFIG_FILE} disagree on tensors {odd[:3]} "
            f"({len(odd)} in all): copy both files again, or {TRAIN_HINT}"
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

"""Hash weights of a model: the maps of every layer and the card that says how they were made.

Loading refuses whatever would give codes that look right and mean nothing: damaged files, wrong
shapes, other models, untrained maps.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.checks import require
from hashattn.base.errors import HashWeightsError
from hashattn.hashing.card import differences, kept_slopes
from hashattn.hashing.maps import HashConfig, LayerMaps, random_maps
from hashattn.hashing.weight_files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    MAPS_FILE,
    TRAIN_HINT,
    read_weights,
    write_weights,
)
from hashattn.kernels import encode
from hashattn.models.heads import HeadSlice
from hashattn.models.identity import base_model_record, model_name
from hashattn.models.structure import attention_shapes, head_slice, require_full_attention


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
        # in the config's order: tensors() is, and the content hash does not depend on the caller
        self.maps = {layer: maps[layer] for layer in config.layers}
        self.card = {
            "format_version": FORMAT_VERSION,
            "trained": False,
            **copy.deepcopy(dict(card)),
        }
        self._placed: dict[tuple[int, str], LayerMaps] = {}
        self._sha256 = _content_hash(config, self.tensors())

    @property
    def trained(self) -> bool:
        """False for random-initialised maps."""
        return bool(self.card["trained"])

    @property
    def sha256(self) -> str:
        """Hash of shapes and tensors (not of the card): the identity of the codes."""
        return self._sha256

    @property
    def slopes(self) -> dict[int, Tensor] | None:
        """{layer: (lists,)} of the card: logits for a unit of score, in the form that the maps were
        trained for (hashing.slopes); None for weights from before they were kept."""
        heads = (self.config.query_heads, self.config.key_maps)
        return kept_slopes(self.card, heads)

    @property
    def learned_length(self) -> int | None:
        """Tokens of the longest context that trained or calibrated them; None if no card says."""
        data = self.card.get("data") or {}
        return (data.get("train") or data).get("longest")

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

    def preactivations_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Post-RoPE queries (B, Hq, q, D) to (B, Hq, q, bits) float32."""
        self.check_queries(queries)
        return self.layer(layer, queries.device).query(queries)

    @torch.no_grad()
    def encode_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Post-RoPE keys (B, Hkv, n, D) to codes (B, Hkv or Hq, n, words) int32."""
        self._check(keys, self.config.kv_heads, "keys")
        return encode(keys, self.layer(layer, keys.device).key)

    @torch.no_grad()
    def encode_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Post-RoPE queries (B, Hq, q, D) to codes (B, Hq, q, words) int32."""
        self.check_queries(queries)
        return encode(queries, self.layer(layer, queries.device).query)

    def check_queries(self, queries: Tensor) -> None:
        """ValueError unless queries (B, Hq, q, D) have the heads and the width of these maps."""
        self._check(queries, self.config.query_heads, "queries")

    def _check(self, x: Tensor, heads: int, name: str) -> None:
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != self.config.head_dim:
            raise ValueError(
                f"{name} have shape {tuple(x.shape)}: these hash weights expect "
                f"(batch, {heads}, tokens, {self.config.head_dim})"
            )

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
            "config": self.config.record(),
            "card": self.card,
        }

    def save(self, directory: str | Path) -> None:
        """Write both files (weight_files), each atomically; WriteError where that fails."""
        write_weights(directory, self.tensors(), self.record())

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

        They have the maps of all heads, also for a model under tensor parallelism, of which this
        process holds some: attach takes its part. There all processes have to load with `model`.

        Raises HashWeightsError for missing, truncated, altered or malformed files, wrong shapes,
        NaN or infinite values, another model than they were trained on, be it only in its query or
        key projections, norms or RoPE settings (unless force), and untrained weights (unless
        allow_untrained). Warns of projections that could not be compared, because
        of an old card (see renew_card), offloading or quantisation. UnsupportedModelError for a
        model whose KV heads the processes of tensor parallelism cannot share evenly.
        """
        if force and model is None:
            raise ValueError(
                "force=True accepts a model: HashWeights.load(path, model, force=True)"
            )
        config, maps, record = read_weights(directory)
        weights = cls(config, maps, record["card"])
        if weights.sha256 != record["sha256"]:
            raise HashWeightsError(
                f"{Path(directory) / MAPS_FILE} does not match the content hash in {CONFIG_FILE}: "
                "the files were altered or belong to different weights; copy both files again or "
                f"{TRAIN_HINT}"
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

        force: it is enough that they fit. Returns how `model` differs from theirs, in words.
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
        mismatch = differences(recorded, model)
        if mismatch and not force:
            name = recorded.get("name") or "another model"
            raise HashWeightsError(
                f"these hash weights were made for {name}, the model at hand "
                f"({model_name(model) or 'unnamed'}) differs in {'; '.join(mismatch)}. "
                f"Load that model, or {TRAIN_HINT}. HashWeights.load(path, model, force=True) "
                "accepts these all the same: for use, which every receipt will say, or as the "
                "`start` of training"
            )
        return mismatch

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


def config_for(
    model: nn.Module, *, layers: Collection[int] | None = None, **fields: Any
) -> HashConfig:
    """HashConfig with the model's shapes; all full-attention layers unless `layers` is given.

    ValueError for other layers, UnsupportedModelError for a model without full attention.
    """
    require_full_attention(model)
    shapes = attention_shapes(model)
    full = shapes["layers"]
    allowed = f"some of {list(full)}, the full-attention layers of this model"
    require(set(layers or ()) <= set(full), "layers", layers, allowed)
    return HashConfig(**{**shapes, **fields, "layers": tuple(layers or full)})


def _content_hash(config: HashConfig, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over shapes, names and float32 bytes, independent of device and file format."""
    digest = hashlib.sha256(json.dumps(config.record(), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()

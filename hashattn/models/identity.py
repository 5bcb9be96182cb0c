"""Which code, model and tokenizer is this? Every hash that says so.

Of two kinds. The keys of results and receipts change with anything that may change an answer:
code_version, config_sha256, model_sha256, tokenizer_sha256. The record by which hash weights
recognise their model stays the same in another dtype, library version or device: base_model_record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.hashes import sha256_text
from hashattn.base.source import packages, sources_sha256
from hashattn.models.families import OTHER_PARTS
from hashattn.models.heads import gathered
from hashattn.models.structure import attention_modules, full_attention_layers, text_config

# Sources that no answer depends on; all others are part of every result's key, so that a file that
# is missing here only costs computing again. These run notebooks and report, show and time, cite
# the paper, and prepare experiments: the records, methods, protocols and hash weights that they
# make are part of a result's key by their content. No other source may import one of these.
PRESENTATION = ("pilot",) + tuple(
    f"reproduce/{name}"
    for name in (
        "__init__.py",
        "__main__.py",
        "notebooks",
        "experiments",
        "published",
        "bench",
        "plots.py",
    )
)

# evenly spaced; training changes nearly all weights, so a sample shows it
_WEIGHTS_PER_TENSOR = 4096

_IDENTITY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "sliding_window",
)
# settings that decide queries, keys and their logits, whatever a family calls them
SETTINGS = re.compile(r"rope|rotary|scal|softcap|multiplier|norm|qk_|clip_qkv|temperature")
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings")
# types of RoPE that do not depend on _POSITIONS
_LENGTH_FREE = {"default", "linear", "llama3", "proportional"}
_CORNER = 64  # rows and columns of the input embedding that are hashed
_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = 2.0**-17  # larger bfloat16 values are exact in float16 too; of those up to it some are not


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256_text(text)


@cache
def code_version() -> str:
    """SHA-256 over all source files of hashattn and its kernels but those of PRESENTATION."""
    return sources_sha256(packages(), without=PRESENTATION)


def config_sha256(config: Any) -> str:
    """SHA-256 of a model configuration, without the fields that do not change the model."""
    content = config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        content.pop(name, None)
    text = json.dumps(content, sort_keys=True, default=str)
    return sha256_text(text)


def model_sha256(model: nn.Module) -> str:
    """SHA-256 over configuration, dtype and a sample of every weight; training and casts change it.

    The configuration includes transformers' version, as another may compute differently. Offloaded
    weights (meta tensors) count by name and shape only. Under tensor parallelism weights are
    gathered, one at a time: every process has to call this, and gets what a single one would.
    """
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    _add_weights(digest, model)
    return digest.hexdigest()


def states_record(model: nn.Module) -> dict[str, Any]:
    """By what cached keys and values recognise the model that computed them: type, shapes and RoPE,
    settings of attention, dtype, and a sample of every weight, which training and casts change.

    The same with another version of transformers or torch, and on another device. Offloaded weights
    and tensor parallelism: as `model_sha256`.
    """
    digest = hashlib.sha256()
    _add_weights(digest, model)
    return {
        "type": text_config(model).model_type,
        "config": config_fingerprint(model),
        "settings": _attention_settings(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }


def _add_weights(digest: Any, model: nn.Module) -> None:
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            digest.update(_sample(weight))


def _sample(weight: Tensor) -> bytes:
    flat = gathered(weight.detach()).flatten()
    sample = flat[:: max(1, len(flat) // _WEIGHTS_PER_TENSOR)].cpu().contiguous()
    return sample.view(torch.uint8).numpy().tobytes()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's class, vocabulary and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return fingerprint([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), template])


def model_name(model: nn.Module) -> str | None:
    """The hub id a model was loaded from, or the name of its folder (not its path); None if
    unknown."""
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    return Path(name).resolve().name if Path(name).is_dir() else name


def base_model_record(model: nn.Module) -> dict[str, Any]:
    """What the card of hash weights says about their model: name, revision, type, fingerprints.

    config_fingerprint: of shapes and RoPE. settings: further fields that decide queries, keys and
    logits. weights_fingerprint: of the input embedding, None where it is offloaded. projections: of
    every full-attention layer, {layer: SHA-256}; unread: {layer: why it has none}.
    The same in float32 and bfloat16, and in float16 for a model that is stored in a 16-bit type.
    Under tensor parallelism every process has to call this.
    """
    projections, unread = _projection_fingerprints(model)
    return {
        "name": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        "type": text_config(model).model_type,
        "config_fingerprint": config_fingerprint(model),
        "settings": _attention_settings(model),
        "weights_fingerprint": weights_fingerprint(model),
        "projections": projections,
        "unread": unread,
    }


def config_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the configuration fields that shape queries and keys."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {
        name: getattr(config, name, None) for name in ("rope_theta", "rope_scaling")
    }
    fields = {name: getattr(config, name, None) for name in _IDENTITY} | {"rope": rope}
    return sha256_text(json.dumps(fields, sort_keys=True, default=str))


def _attention_settings(model: nn.Module) -> dict[str, Any]:
    """The configuration's fields that decide queries, keys and their logits: RoPE (with the number
    of positions, where it depends on that), scalings, caps and norms. As JSON."""
    content = text_config(model).to_dict()
    names = {name for name in content if SETTINGS.search(name)}
    if not _rope_types(content.get("rope_parameters")) <= _LENGTH_FREE:
        names.update(_POSITIONS)
    settings = {name: content[name] for name in sorted(names) if content.get(name) is not None}
    return json.loads(json.dumps(settings, default=str))


def attends_by_distance(model: nn.Module) -> bool:
    """Whether attention is the same wherever a text begins: positions enter by a rotary embedding
    alone, of a type that does not depend on the length."""
    types = _rope_types(getattr(text_config(model), "rope_parameters", None))
    return bool(types) and types <= _LENGTH_FREE


def _rope_types(parameters: Any) -> set[str]:
    """The RoPE types in rope_parameters, also where each kind of layer has its own."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    rope_type = parameters.get("rope_type")
    return set().union(*nested, {rope_type} if rope_type else ())


def weights_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of a corner of the input embedding rounded to bfloat16, so that it is the same in
    another dtype; None where the embedding is offloaded.

    Under tensor parallelism every process has to call this.
    """
    embedding = model.get_input_embeddings().weight
    if embedding.is_meta:
        return None
    columns = gathered(
        embedding.detach()[:, :_CORNER]
    )  # the whole of a large one would cost memory
    corner = columns[:_CORNER].cpu().to(torch.bfloat16).contiguous()
    return hashlib.sha256(corner.view(torch.int16).numpy().tobytes()).hexdigest()


def _projection_fingerprints(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """({layer: SHA-256}, {layer: why it cannot be read}) of the full-attention layers.

    Over every weight and bias that computes a layer's queries and keys, with adapters, and over the
    norms of its block; all elements, rounded to bfloat16 (20 million a layer of an 8B model, some
    seconds on one core for all). Weights that accelerate keeps on the CPU or a disk are fetched.
    "offloaded": weights that cannot be fetched (meta tensors); "quantised": weights that are not
    plain floating-point tensors.
    """
    hashes, unread = {}, {}
    for layer, parameters in _query_key_parameters(model).items():
        reason = _why_unread(list(parameters.values()))
        if reason is not None:
            unread[str(layer)] = reason
            continue
        digest = hashlib.sha256()
        for name, weight in sorted(parameters.items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(_portable(weight).numpy().tobytes())
        hashes[str(layer)] = digest.hexdigest()
    return hashes, unread


def adapted_layers(model: nn.Module) -> list[int]:
    """Full-attention layers whose query or key projections hold a PEFT adapter (not merged)."""
    adapter = re.compile(r"\b(base_layer|lora_)")
    layers = _query_key_parameters(model).items()
    return [layer for layer, parameters in layers if any(map(adapter.search, parameters))]


def _query_key_parameters(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """{layer: {name: parameter}} of queries, keys and norms of each full-attention layer."""
    full = full_attention_layers(model)
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    parameters: dict[int, dict[str, Tensor]] = {layer: {} for layer in sorted(full)}
    for attention in attention_modules(model):
        if attention.layer_idx in full:
            block = _block_parameters(parents[attention], attention)
            parameters[attention.layer_idx].update(block)
    return parameters


def _block_parameters(block: nn.Module, attention: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in _parameters(attention):
        if not OTHER_PARTS.intersection(name.split(".")):
            yield f"attention.{name}", weight
    for child_name, child in block.named_children():
        if "norm" in type(child).__name__.lower():
            for name, weight in _parameters(child):
                yield f"{child_name}.{name}", weight


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """named_parameters; offloaded ones are fetched by accelerate's hooks."""
    for name, weight in module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        hook = getattr(module.get_submodule(owner), "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            stored = getattr(part, "weights_map", None)
            if weight.is_meta and stored is not None:
                weight = stored[attribute]
        yield name, weight


def _why_unread(parameters: list[Tensor]) -> str | None:
    """Why parameters cannot be compared with those of the same model elsewhere, None if they can.

    A quantised projection has another dtype or its own tensor class, or is not a parameter."""
    if any(weight.is_meta for weight in parameters):
        return "offloaded"
    plain = all(weight.dtype in _PRECISIONS and _is_plain(weight) for weight in parameters)
    return None if plain and any(w.dim() > 1 for w in parameters) else "quantised"


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor) or hasattr(weight, "full_tensor")


def _portable(weight: Tensor) -> Tensor:
    """A weight rounded to what bfloat16 and float16 both hold: its bits, int16 on the CPU."""
    rounded = gathered(weight.detach()).to(torch.bfloat16)
    rounded = rounded.masked_fill(rounded.abs() <= TINY, 0.0)
    return rounded.cpu().contiguous().view(torch.int16)

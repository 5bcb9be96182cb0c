"""Which model is this? Attention shapes and fingerprints that survive dtype and library version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hashattn.heads import HeadSlice, gathered

IDENTITY = (
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
SAMPLE = 64  # rows and columns of the input embedding that are hashed
KEY_PROJECTIONS = (".k_proj", ".qkv_proj", ".query_key_value")


def attention_shapes(model: nn.Module) -> dict[str, Any]:
    """query_heads, kv_heads, head_dim and full-attention `layers` of a model's text part."""
    return _shapes(model.config)


def _shapes(config: Any) -> dict[str, Any]:
    config = config.get_text_config()
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        windowed = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return {
        "query_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    }


def shared_by(model: nn.Module) -> int:
    """How many processes hold a part of `model` each (tensor parallelism); 1: it is whole."""
    return getattr(model, "_tp_size", None) or 1


def head_slice(model: nn.Module) -> HeadSlice | None:
    """The heads of `model` that this process holds under tensor parallelism, None for all.

    Raises UnsupportedModelError for KV heads that the processes cannot share evenly.
    """
    ranks = shared_by(model)
    if ranks == 1:
        return None
    mesh = model._device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    return planned_heads(model.config, model.tp_plan, mesh.get_local_rank(), ranks)


def planned_heads(
    config: Any, plan: dict[str, str] | None, rank: int, ranks: int
) -> HeadSlice | None:
    """The heads that a tensor parallel plan {projection: style} gives a process, None for all.

    Not every plan shards attention: some gather q, k and v again, or shard experts alone.
    """
    styles = {style for name, style in (plan or {}).items() if name.endswith(KEY_PROJECTIONS)}
    if "colwise" not in styles:
        return None
    shapes = _shapes(config)
    return HeadSlice(shapes["query_heads"], shapes["kv_heads"], rank, ranks)


def model_name(model: nn.Module) -> str | None:
    """The hub id a model was loaded from, or the name of its folder (not where that lies)."""
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    return Path(name).resolve().name if Path(name).is_dir() else name


def config_fingerprint(model: nn.Module) -> str:
    """sha256 of the configuration fields that shape queries and keys."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {
        name: getattr(config, name, None) for name in ("rope_theta", "rope_scaling")
    }
    fields = {name: getattr(config, name, None) for name in IDENTITY} | {"rope": rope}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str | None:
    """sha256 of a corner of the input embedding rounded to bfloat16, so that the same model in
    another dtype has the same one; None where the embedding is not at hand (offloaded).

    The processes of tensor parallelism put it together, so all of them have to call this.
    """
    embedding = model.get_input_embeddings().weight
    if embedding.is_meta:
        return None
    columns = gathered(embedding.detach()[:, :SAMPLE])  # not all of a large embedding
    corner = columns[:SAMPLE].cpu().to(torch.bfloat16).contiguous()
    return hashlib.sha256(corner.view(torch.int16).numpy().tobytes()).hexdigest()


def base_model_record(model: nn.Module) -> dict[str, Any]:
    """What a card says about its model: name, revision, type and fingerprints."""
    config = model.config
    return {
        "name": model_name(model),
        "revision": getattr(config, "_commit_hash", None),
        "type": config.get_text_config().model_type,
        "config_fingerprint": config_fingerprint(model),
        "weights_fingerprint": weights_fingerprint(model),
    }

"""A model's attention: its modules, shapes, kinds of layers, and heads under tensor parallelism.

The one place that knows how families name and limit their attention.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

from hashattn.base.errors import UnsupportedModelError
from hashattn.models.heads import HeadSlice

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # layer_past: GPT-NeoX
KEY_PROJECTIONS = (".k_proj", ".qkv_proj", ".query_key_value")
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LIMITS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}  # kind: its length in tokens


def text_config(model: nn.Module) -> Any:
    """The language model's own configuration, also of a vision-language model."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a layer index that take a cache and forward keywords to the interface."""
    return [module for module in model.modules() if _is_attention(module)]


def _is_attention(module: nn.Module) -> bool:
    if getattr(module, "layer_idx", None) is None:
        return False
    parameters = inspect.signature(module.forward).parameters
    return (
        any(name in parameters for name in CACHE_ARGUMENTS)
        and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        and _uses_interface(type(module))
    )


@cache
def _uses_interface(kind: type[nn.Module]) -> bool:
    """Whether a module class calls transformers' attention interface; its source is read once."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What every layer of a model's text part attends to: FULL, or transformers' name for less.

    A window or chunk at least as long as the positions limits nothing: such a layer is FULL.
    """
    config = config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    each = getattr(config, "per_layer_config", None) or [config] * count  # where layers differ
    named = getattr(config, "layer_types", None) or [_unnamed(each[i], i) for i in range(count)]
    positions = getattr(config, "max_position_embeddings", None)

    def kind(i: int) -> str:
        limit = getattr(each[i], LIMITS[named[i]], None) if named[i] in LIMITS else None
        return FULL if limit and positions and limit >= positions else named[i]

    return tuple(kind(i) for i in range(count))


def _unnamed(config: Any, layer: int) -> str:
    """The kind of a layer in a configuration without layer_types."""
    window = getattr(config, "sliding_window", None)
    first = getattr(config, "max_window_layers", None) or 0  # Qwen: those before have none
    if window is not None and getattr(config, "use_sliding_window", True) and layer >= first:
        return SLIDING
    return FULL if getattr(config, "attention_chunk_size", None) is None else CHUNKED


def full_attention_layers(model: nn.Module) -> frozenset[int]:
    """Layers whose attention reaches back to the first token."""
    full = _full_layers(model.config)
    return frozenset(m.layer_idx for m in attention_modules(model)).intersection(full)


def require_full_attention(model: nn.Module) -> None:
    """Raise UnsupportedModelError where no layer can be made sparse, because all have a window."""
    kinds = layer_kinds(model.config)
    if FULL in kinds:
        return
    config = text_config(model)
    windows = {name: getattr(config, name, None) for name in LIMITS.values()}
    limits = ", ".join(f"{name}={value}" for name, value in windows.items() if value)
    raise UnsupportedModelError(
        f"{type(model).__name__} has nothing to make sparse: none of its {len(kinds)} layers has "
        f"full attention ({', '.join(sorted(set(kinds)))}{limits and '; ' + limits}), so each "
        "reads few tokens already; use a model with full-attention layers"
    )


def attention_shapes(model: nn.Module) -> dict[str, Any]:
    """query_heads, kv_heads, head_dim and full-attention `layers` of a model's text part."""
    return _shapes(model.config)


def _full_layers(config: Any) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(layer_kinds(config)) if kind == FULL)


def _shapes(config: Any) -> dict[str, Any]:
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "query_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "layers": _full_layers(config),
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

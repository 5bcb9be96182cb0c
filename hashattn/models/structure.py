"""A model's attention: its modules, shapes, full-attention layers and heads held by a process."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

from hashattn.base.errors import UnsupportedModelError
from hashattn.models.families import (
    CACHE_ARGUMENTS,
    FULL,
    LIMITS,
    head_shapes,
    layer_kinds,
    splits_keys,
)
from hashattn.models.heads import HeadSlice


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a vision-language model."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a layer index that take a cache and pass keywords on to transformers'
    attention interface."""
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


def full_attention_layers(model: nn.Module) -> frozenset[int]:
    """Layers whose attention reaches back to the first token."""
    full = _full_layers(model.config)
    return frozenset(m.layer_idx for m in attention_modules(model)).intersection(full)


def require_full_attention(model: nn.Module) -> None:
    """Raise UnsupportedModelError where no layer can be sparse because none has full attention."""
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
    return head_shapes(config) | {"layers": _full_layers(config)}


def shared_by(model: nn.Module) -> int:
    """How many processes share `model` by tensor parallelism; 1 for a whole model."""
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

    Not every plan shards attention: some gather q, k and v again, or shard only experts.
    """
    if not splits_keys(plan or {}):
        return None
    shapes = head_shapes(config)
    return HeadSlice(shapes["query_heads"], shapes["kv_heads"], rank, ranks)

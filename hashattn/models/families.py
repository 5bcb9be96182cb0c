"""Families' quirks: what they call things, and how they limit, cap and share out their attention.

Whatever differs between Hugging Face families is read here, from a configuration, an attention
module or the keywords that it passes on; nothing else in the package knows a family's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # layer_past: GPT-NeoX
KEY_PROJECTIONS = (".k_proj", ".qkv_proj", ".query_key_value")
# parts of an attention module that make neither queries nor keys
OTHER_PARTS = {"v_proj", "o_proj", "out_proj", "c_proj", "dense", "wo", "wv", "v_norm", "o_norm"}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LIMITS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}  # kind: its length in tokens


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What every layer of a model's text part attends to: FULL, or transformers' name for less.

    A window or chunk at least as long as the positions limits nothing: such a layer is FULL.
    """
    config = config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    each = getattr(config, "per_layer_config", None) or [config] * count  # where layers differ
    named = getattr(config, "layer_types", None) or [_unnamed(each[i], i) for i in range(count)]
    positions = max_positions(config)

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


def max_positions(config: Any) -> int | None:
    """Tokens that a model's positions reach; None for a model without a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def head_shapes(config: Any) -> dict[str, int]:
    """query_heads, kv_heads and head_dim of a model's text part."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "query_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def caches_latents(config: Any) -> bool:
    """Whether the cache holds latents instead of keys (MLA: DeepSeek)."""
    return bool(getattr(config, "kv_lora_rank", None))


def tensor_parallel_plan(config: Any) -> dict[str, str] | None:
    """{projection: style} by which a model of this configuration is sharded, None without one."""
    return config.get_text_config().base_model_tp_plan


def splits_keys(plan: Mapping[str, str]) -> bool:
    """Whether a tensor parallel plan {projection: style} gives every process its own KV heads."""
    return "colwise" in {style for name, style in plan.items() if name.endswith(KEY_PROJECTIONS)}


def logit_cap(keywords: Mapping[str, Any]) -> float | None:
    """The c of c * tanh(logit / c) among an attention function's keywords (Gemma 2), or None."""
    return keywords.get("softcap")


def softmax_sinks(module: nn.Module, keywords: Mapping[str, Any]) -> Tensor | None:
    """Learned extra logits of the softmax sum (gpt-oss), (heads,), or None."""
    sinks = keywords.get("s_aux")
    return sinks if sinks is not None else getattr(module, "sinks", None)


def adds_position_bias(keywords: Mapping[str, Any]) -> bool:
    """Whether something is added to the logits by position (T5's relatives)."""
    return keywords.get("position_bias") is not None

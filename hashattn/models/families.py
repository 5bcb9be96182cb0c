"""Where Hugging Face model families differ: names, layer kinds, heads, logit caps, sinks.

All of it is read here, from a configuration, an attention module or the keywords that it passes on;
no other file in the package knows a family's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # layer_past: GPT-NeoX
_KEY_PROJECTIONS = (".k_proj", ".qkv_proj", ".query_key_value")
# parts of an attention module that compute neither queries nor keys
OTHER_PARTS = {"v_proj", "o_proj", "out_proj", "c_proj", "dense", "wo", "wv", "v_norm", "o_norm"}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# kind: the configuration's field for its length in tokens
LIMITS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What every layer of a model's text part attends to: FULL, or transformers' name for less.

    A window or chunk at least as long as the positions limits nothing: such a layer is FULL.
    """
    config = config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    configs = getattr(config, "per_layer_config", None) or [config] * count  # where layers differ
    kinds = getattr(config, "layer_types", None)
    kinds = kinds or [_inferred_kind(configs[i], i) for i in range(count)]
    positions = max_positions(config)

    def effective(i: int) -> str:
        limit = getattr(configs[i], LIMITS[kinds[i]], None) if kinds[i] in LIMITS else None
        return FULL if limit and positions and limit >= positions else kinds[i]

    return tuple(effective(i) for i in range(count))


def _inferred_kind(config: Any, layer: int) -> str:
    """The kind of a layer in a configuration without layer_types."""
    window = getattr(config, "sliding_window", None)
    first = getattr(config, "max_window_layers", None) or 0  # Qwen: no window before it
    if window is not None and getattr(config, "use_sliding_window", True) and layer >= first:
        return SLIDING
    return FULL if getattr(config, "attention_chunk_size", None) is None else CHUNKED


def max_positions(config: Any) -> int | None:
    """How many positions a model has; None for a model without a limit."""
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
    return "colwise" in {style for name, style in plan.items() if name.endswith(_KEY_PROJECTIONS)}


def logit_cap(keywords: Mapping[str, Any]) -> float | None:
    """The c of c * tanh(logit / c) among an attention function's keywords (Gemma 2), or None."""
    return keywords.get("softcap")


def softmax_sinks(module: nn.Module, keywords: Mapping[str, Any]) -> Tensor | None:
    """Learned extra logits of the softmax sum (gpt-oss), (heads,), or None."""
    sinks = keywords.get("s_aux")
    if sinks is None:  # getattr costs every layer's step a microsecond where there are none
        own = vars(module)
        sinks = own["sinks"] if "sinks" in own else own.get("_parameters", {}).get("sinks")
    return sinks


def adds_position_bias(keywords: Mapping[str, Any]) -> bool:
    """Whether the logits get a bias by position (T5 and its relatives)."""
    return keywords.get("position_bias") is not None

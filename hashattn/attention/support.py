"""Which models sparse attention can serve, found from their structure; clear refusals."""

import inspect
from functools import cache

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import AttachmentError, UnsupportedModelError

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # layer_past: GPT-NeoX
DENSE_IMPLEMENTATIONS = ("sdpa", "eager")


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
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


def full_attention_layers(model: PreTrainedModel) -> frozenset[int]:
    """Layers whose attention reaches back to the first token."""
    config = text_config(model)
    layers = {module.layer_idx for module in attention_modules(model)}
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return frozenset(i for i in layers if kinds[i] == "full_attention")
    windows = ("sliding_window", "attention_chunk_size")
    limited = any(getattr(config, name, None) is not None for name in windows)
    return frozenset() if limited else frozenset(layers)


def check_model(model: PreTrainedModel, name: str) -> None:
    """Raise UnsupportedModelError, with what to do, for models that cannot be attached."""
    if not isinstance(model, PreTrainedModel):
        hint = "its get_base_model()" if hasattr(model, "get_base_model") else "the model inside"
        raise UnsupportedModelError(
            f"attach needs a transformers PreTrainedModel, got {type(model).__name__}: pass {hint}"
        )
    family = type(model).__name__
    config = text_config(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{family} is an encoder-decoder: only decoders are supported")
    if config._attn_implementation == name:
        raise AttachmentError(f"{family} already uses {name!r}: call detach first")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{family} caches latents instead of keys (MLA), which is not verified here"
        )
    if not model._can_set_attn_implementation() or not attention_modules(model):
        raise UnsupportedModelError(
            f"{family} computes attention outside transformers' AttentionInterface, so it cannot "
            "be replaced; use a family that goes through it (Llama, Mistral, Qwen, Gemma, Phi ...)"
        )
    if config._attn_implementation not in DENSE_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{family} runs {config._attn_implementation!r} attention: load it with "
            'attn_implementation="sdpa" (or "eager"), which the dense calls use'
        )


def check_switched(model: PreTrainedModel, name: str) -> None:
    """Raise UnsupportedModelError if transformers kept the old attention."""
    actual = text_config(model)._attn_implementation
    if actual != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} kept its {actual!r} attention: this family does not accept "
            "another implementation"
        )

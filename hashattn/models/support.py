"""Which models sparse attention supports; clear errors for all others."""

from transformers import PreTrainedModel

from hashattn.base.errors import AttachmentError, UnsupportedModelError
from hashattn.models.families import caches_latents
from hashattn.models.structure import attention_modules, require_full_attention, text_config

_DENSE_IMPLEMENTATIONS = ("sdpa", "eager")


def check_model(model: PreTrainedModel, name: str) -> None:
    """Raise UnsupportedModelError for models that cannot be attached, with what to do.

    name: of our attention function; AttachmentError for a model that uses it already.
    """
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
    if caches_latents(config):
        raise UnsupportedModelError(
            f"{family} caches latents instead of keys (MLA), which is not verified here"
        )
    if not model._can_set_attn_implementation() or not attention_modules(model):
        raise UnsupportedModelError(
            f"{family} computes attention outside transformers' AttentionInterface, so it cannot "
            "be replaced; use a family that goes through it (Llama, Mistral, Qwen, Gemma, Phi ...)"
        )
    if config._attn_implementation not in _DENSE_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{family} runs {config._attn_implementation!r} attention: load it with "
            'attn_implementation="sdpa" (or "eager"), which the dense calls use'
        )
    require_full_attention(model)


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention of the text model only: a vision tower has no cache."""
    config, text = model.config, text_config(model)
    if text is config:
        model.set_attn_implementation(name)
        return
    key = next(key for key in config.sub_configs if getattr(config, key, None) is text)
    model.set_attn_implementation({key: name})


def check_switched(model: PreTrainedModel, name: str) -> None:
    """Raise UnsupportedModelError if transformers kept the old attention."""
    actual = text_config(model)._attn_implementation
    if actual != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} kept its {actual!r} attention: this family does not accept "
            "another implementation"
        )

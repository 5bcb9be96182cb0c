"""Hooks of an attached model: whether a call reads the prompt, and which cache layer a module uses.

A copy of the model, by deepcopy or pickle, gets dead hooks in their place: it is dense, as the
model was, and writes no receipt.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from hashattn.attention.cache import indexed_layer
from hashattn.attention.run import CALL, NAME, DetachedCall, LayerCall, SparseRun
from hashattn.attention.static import continues_static, is_static
from hashattn.attention.stored import StoredLayer, store_layer
from hashattn.base.errors import AttachmentError
from hashattn.models.families import CACHE_ARGUMENTS
from hashattn.models.structure import attention_modules

_INPUTS = ("input_ids", "inputs_embeds")
# attributes of a cache: length of the prompt that began it, as far as read; and, while a model
# runs, whether it reads that prompt
PROMPT, IN_PROMPT = "_hashattn_prompt", "_hashattn_in_prompt"


def install_hooks(model: PreTrainedModel, run: SparseRun, previous: str) -> list[Any]:
    """Register all hooks; returns the handles that remove them. previous: the model's attention."""
    handles = [
        model.register_forward_pre_hook(_BeforeModel(), with_kwargs=True),
        model.register_forward_hook(_AfterModel(), with_kwargs=True, always_call=True),
    ]
    checked: set[int] = set()
    for module in attention_modules(model):
        hook = _BeforeLayer(run, previous, checks=id(module.config) not in checked)
        checked.add(id(module.config))
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def previous_of_copy(model: nn.Module) -> str | None:
    """The attention that a copy of an attached model had before; None for any other model."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _DeadLayerHook):
                return hook.previous
    return None


def remove_copied_hooks(model: nn.Module) -> None:
    """Take all dead hooks out of a copy."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Dead)]:
                del hooks[key]


class _Dead:
    """Marks the hooks of a copy."""


class _DeadHook(_Dead):
    """In a copy, in place of a hook of the whole model."""

    def __call__(self, *args: Any) -> None:
        """Changes nothing."""


class _DeadLayerHook(_Dead):
    """In a copy, in place of a layer's hook: the attention function stays the model's own."""

    def __init__(self, previous: str) -> None:
        self.previous = previous

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {CALL: DetachedCall(self.previous == "eager")}


class _BeforeModel:
    """Marks on the cache, while a model runs, whether it reads the prompt that began the cache.

    A further chunk of the prompt is recognised by the logits it asks for: only the last row's.
    Drafted tokens need the logits of every row, and a second turn comes after a step.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = _cache(kwargs)
        if cache is None:
            return
        inputs = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
        rows = next((tokens.shape[1] for tokens in inputs if tokens is not None), 1)
        if rows > 1 or not continues_static(cache):
            self._mark(cache, rows, kwargs)

    @torch._dynamo.disable
    def _mark(self, cache: Cache, rows: int, kwargs: dict) -> None:
        before = int(cache.get_seq_length())
        continues = vars(cache).get(PROMPT) == before and rows > 1
        in_prompt = before == 0 or (continues and kwargs.get("logits_to_keep") == 1)
        vars(cache).update({PROMPT: before + rows if in_prompt else None, IN_PROMPT: in_prompt})

    def __reduce__(self) -> tuple:
        return _DeadHook, ()


class _AfterModel:
    """Removes the mark of the running call; marks a cache that the call created."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache = _cache(kwargs)
        if cache is None or hasattr(cache, IN_PROMPT):
            self._mark(cache, output)

    @torch._dynamo.disable
    def _mark(self, cache: Cache | None, output: Any) -> None:
        if cache is not None:
            vars(cache).pop(IN_PROMPT, None)
        elif isinstance(new_cache := getattr(output, "past_key_values", None), Cache):
            vars(new_cache)[PROMPT] = int(new_cache.get_seq_length())

    def __reduce__(self) -> tuple:
        return _DeadHook, ()


class _BeforeLayer:
    """Passes an attention module's cache layer to the attention function.

    checks: whether it looks if the model's attention was changed; one of the modules that share a
    configuration does, as looking costs each step of a layer some microseconds.
    """

    def __init__(self, run: SparseRun, previous: str, checks: bool) -> None:
        self.run, self.previous, self.checks = run, previous, checks

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.checks and module.config._attn_implementation != NAME:
            raise AttachmentError(
                f"the model's attention was set to {module.config._attn_implementation!r} while "
                "sparse attention was attached: detach before set_attn_implementation"
            )
        cache = _cache(kwargs)
        layer, in_prompt = None, False
        current = static = continues = False
        if cache is not None:
            full = module.layer_idx in self.run.full_layers
            layer = indexed_layer(cache, module.layer_idx, full)
            in_prompt = getattr(cache, IN_PROMPT, False)
            static = is_static(cache, module.layer_idx)
            continues = static and continues_static(cache)
        if layer is not None:
            if self.run.stores(module.layer_idx):
                layer = store_layer(
                    cache, module.layer_idx, self.run.storage, self.run.receipt.traffic
                )
            current = not layer.behind
            layer.written, layer.paired_from = False, self.run.dense_below
            layer.lends = isinstance(layer, StoredLayer)
        call = LayerCall(
            self.run, module.layer_idx, layer, cache is not None, in_prompt, current, static,
            continues,
        )  # fmt: skip
        return args, kwargs | {CALL: call}

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _DeadLayerHook, (self.previous,)


def _cache(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a module's keyword arguments."""
    for name in CACHE_ARGUMENTS:
        cache = kwargs.get(name)
        if cache is not None:
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            return cache if isinstance(cache, Cache) else None
    return None

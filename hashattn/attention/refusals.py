"""Calls that sparse attention cannot serve, each refused at the first place that can tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hashattn.attention.inputs import Inputs
from hashattn.attention.run import LayerCall
from hashattn.base.errors import AttachmentError, UnsupportedModelError
from hashattn.models.heads import HeadSlice
from hashattn.selectors.base import Selector


def refuse_call(call: LayerCall, inputs: Inputs) -> None:
    """UnsupportedModelError for what no call may have: paged caches, other heads than planned."""
    _refuse_paged(inputs.others)
    if call.run.heads is not None and call.indexed:
        _refuse_other_heads(call.layer, call.run.heads, inputs.query, inputs.key)


def _refuse_paged(kwargs: dict[str, Any]) -> None:
    """UnsupportedModelError for continuous batching, whose caches are paged."""
    if kwargs.get("cache") is not None or kwargs.get("block_table") is not None:
        raise UnsupportedModelError(
            "continuous batching (paged caches) is not supported: use model.generate, or detach "
            "before model.generate_batch"
        )


def refuse_training(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> None:
    """UnsupportedModelError where gradients or attention weights are needed.

    query: (batch, heads, q, head_dim); kwargs: of the attention function.
    """
    if module.training and query.requires_grad:
        raise UnsupportedModelError(
            "sparse attention does not train: selection has no gradient. Call model.eval(), or "
            "detach before training"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise UnsupportedModelError(
            "output_attentions=True: sparse attention computes no full attention matrix. Leave "
            "it off, or detach to look at dense attention weights"
        )


def _refuse_other_heads(layer: int, part: HeadSlice, query: Tensor, key: Tensor) -> None:
    """UnsupportedModelError unless there are as many heads as the model's plan gives this process.

    Only for tensor parallelism: some families attend with other heads than their configuration has.
    query: (batch, heads, q, head_dim); key: (batch, kv_heads, n, head_dim).
    """
    heads = query.shape[1], key.shape[1]
    if heads != (len(part.query), len(part.kv)):
        raise UnsupportedModelError(
            f"layer {layer} attends with {heads[0]} query heads and {heads[1]} KV heads on rank "
            f"{part.rank}, expected {len(part.query)} and {len(part.kv)}: tensor parallelism does "
            'not split this model by heads; load it with device_map="auto" instead'
        )


def refuse_other_slot(layer: int) -> None:
    """UnsupportedModelError: the module keeps its keys elsewhere; the index would be of others."""
    raise UnsupportedModelError(
        f"the attention module of layer {layer} keeps its keys in another slot of the cache than "
        "its layer number, as models do that run their layers several times (looped models): "
        "codes would belong to other keys. This family is not supported; detach to run it dense"
    )


def refuse_unobserved(selector: Selector, seen: int, before: int) -> None:
    """AttachmentError unless a selector that observes has seen all tokens cached before a call."""
    if seen != before:
        raise AttachmentError(
            f"selector {selector.name!r} decides from the attention it saw, but of the "
            f"{before} tokens cached before this call it saw {seen}: attach it before the prompt "
            "is prefilled, and keep it attached"
        )

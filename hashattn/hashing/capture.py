"""Queries and keys of a Hugging Face causal LM, tapped at its attention function.

The model runs through transformers' AttentionInterface with the call convention that the sparse
path uses too, so captured tensors are exactly what attention reads: post-RoPE, KV heads not
repeated. The base model runs (no LM head) in chunks with a DynamicCache; no attention matrix of
a sequence is ever stored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hashattn.base.checks import is_count, require
from hashattn.base.engines.threads import FasterThreads
from hashattn.base.errors import UnsupportedModelError
from hashattn.models.dense import dense_attention
from hashattn.models.families import logit_cap
from hashattn.models.structure import attention_shapes, head_slice

NAME = "hashattn_capture"
_THREADS = FasterThreads()


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of one sequence: queries (Hq, r, D) at positions (r,), keys and values
    (Hkv, n, D) in the model's dtype; logits are scaling * q.k, capped by softcap if set."""

    layer: int
    queries: Tensor
    positions: Tensor
    keys: Tensor
    scaling: float
    softcap: float | None = None
    values: Tensor | None = None


class _Tap:
    """Collects queries at `rows` chunk by chunk; keys are the last chunk's full cache."""

    def __init__(self, rows: Tensor, layers: Collection[int], values: bool) -> None:
        self.rows, self.layers, self.values = rows, layers, values
        self.queries: dict[int, list[Tensor]] = {}
        self.last: dict[int, tuple] = {}

    def record(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        if layer not in self.layers:
            return
        end = key.shape[2]
        rows = self.rows[(self.rows >= end - query.shape[2]) & (self.rows < end)]
        rows = (rows - (end - query.shape[2])).to(query.device)
        self.queries.setdefault(layer, []).append(query[0].index_select(1, rows))
        self.last[layer] = (key, value, scaling, softcap)

    def result(self) -> dict[int, CapturedLayer]:
        captures = {}
        for layer, (key, value, scaling, softcap) in sorted(self.last.items()):
            captures[layer] = CapturedLayer(
                layer,
                torch.cat(self.queries[layer], 1),
                self.rows.to(key.device),
                key[0],
                scaling,
                softcap,
                value[0] if self.values else None,
            )
        return captures


def _capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    hashattn_tap: _Tap | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    if hashattn_tap is not None:
        # None is how families leave the usual scaling to the attention function
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        hashattn_tap.record(module.layer_idx, query, key, value, scale, logit_cap(kwargs))
    return dense_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        eager=False,
        scaling=scaling,
        dropout=dropout,
        **kwargs,
    )


def _switch_to_capture(model: nn.Module) -> None:
    """Route attention through the tap, or raise UnsupportedModelError."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _capture_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # unregistered names get no mask at all
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not route attention through transformers' "
            "AttentionInterface, so its queries and keys cannot be captured; use a model family "
            "that does (Llama, Mistral, Qwen, Gemma, Phi3, GPT-NeoX, ...)"
        )


def _check_rows(rows: Tensor | None, n: int) -> Tensor:
    """Sorted distinct positions, all of them for None; ValueError if outside the sequence."""
    if rows is None:
        return torch.arange(n)
    rows = torch.as_tensor(rows, dtype=torch.long).cpu().unique()
    if rows.numel() and not (0 <= rows[0] and rows[-1] < n):
        raise ValueError(
            f"rows span {int(rows[0])}..{int(rows[-1])} but the sequence has {n} "
            f"tokens: use positions from 0 to {n - 1}"
        )
    return rows


def _positions(part: Tensor, start: int, shift: int) -> dict[str, Tensor]:
    """Of a chunk (1, n), as the model takes them; nothing where they are what it would take."""
    if not shift:
        return {}
    place = torch.arange(part.shape[1], device=part.device)
    return {"position_ids": (place + start + shift)[None]}


@torch.no_grad()
def capture(
    model: nn.Module,
    input_ids: Tensor,
    *,
    rows: Tensor | None = None,
    chunk: int = 1024,
    layers: Collection[int] | None = None,
    values: bool = False,
    shift: int = 0,
) -> dict[int, CapturedLayer]:
    """Run input_ids (n,) or (1, n) through the model and return each full-attention layer's
    queries at `rows` (all positions by default), keys and, with `values`, values.

    shift: position of the first token, for the model's rotary embedding alone: rows and
    `CapturedLayer.positions` count from 0. What a rotary model attends to is the same at any shift,
    keys and queries are not: codes that shall serve long contexts have to see late positions.

    The model is left as it was: implementation and training mode are restored, also on errors.
    Raises ValueError for a bad shape, rows or chunk; UnsupportedModelError where the model's
    attention cannot be tapped, a requested layer has no full attention, or the heads are spread
    over processes.
    """
    if head_slice(model) is not None:
        raise UnsupportedModelError(
            "capturing needs all heads in one process, and tensor parallelism spreads them: train "
            'and calibrate with the model on one device, or loaded with device_map="auto"'
        )
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: pass one sequence of at "
            "least one token, (n,) or (1, n)"
        )
    require(is_count(chunk), "chunk", chunk, "an integer of at least 1")
    full = attention_shapes(model)["layers"]
    tapped = full if layers is None else set(layers).intersection(full)
    tap = _Tap(_check_rows(rows, ids.shape[1]), tapped, values)
    before, training = model.config.get_text_config()._attn_implementation, model.training
    base, cache = model.base_model, DynamicCache(config=model.config.get_text_config())
    for i, layer in enumerate(cache.layers):
        if i in full and layer.is_sliding:  # a window as long as the positions: keep every key
            cache.layers[i] = DynamicLayer()
    try:
        model.eval()
        _switch_to_capture(model)
        with _THREADS.piece((id(model), chunk, ids.shape[1].bit_length()), ids.shape[1]):
            for start in range(0, ids.shape[1], chunk):
                part = ids[:, start : start + chunk].to(model.device)
                base(input_ids=part, past_key_values=cache, use_cache=True, hashattn_tap=tap,
                     **_positions(part, start, shift))  # fmt: skip
    finally:
        model.set_attn_implementation(before)
        if training:
            model.train()
    captures = tap.result()
    missing = set(layers or ()) - set(captures)
    if missing or not captures:
        raise UnsupportedModelError(
            f"no queries and keys were seen in layers {sorted(missing) or 'of this model'}: hash "
            "maps serve full-attention layers only; leave the others out of `layers`"
        )
    return captures

"""Double Sparsity (Yang et al. 2024): rank tokens by a few strong key channels, quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require, require_one_of
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.calibration import CapturedRows, mean_by_layer, tensors_sha256
from hashattn.selectors.grids import fit_grid, grid_labels, grid_values
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

_LABEL_BITS = (2, 4, 8, 16)
_SCALE_BITS = 32  # a label's minimum and step, float16 each


@dataclass(frozen=True, eq=False)
class DoubleSparsitySelector(Selector):
    """score = q[C].k[C] over the calibrated channels C, both sides quantised per token.

    channels {layer: int64 (heads, r)}: with as many heads as the model has query heads (the
    official "per_query_head") every query head keeps its own labels of a token; with as many as KV
    heads ("per_kv_head") a group shares one. label_bits 2, 4 or 8: asymmetric min-max quantisation
    over the r channels of one token, 2**bits - 1 steps, as the official code; 16: float16, no
    scales. grids {layer: (heads, 2, r)}, from `calibrate(grid=True)`: labels on a grid per channel
    instead, which saves a token its minimum and step; queries stay as they are.
    layout "per_query_head" (official) selects per query head, "per_kv_head" sums a group's scores
    and selects once; it needs per_kv_head labels.
    """

    name = "double_sparsity"
    style = MethodStyle("#d55e00", "^", "Double Sparsity")
    needs = "calibration"

    channels: Mapping[int, Tensor] = field(repr=False)
    label_bits: int = 4
    channel_layout: Layout = "per_query_head"
    layout: Layout = "per_query_head"
    grids: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_one_of("label_bits", self.label_bits, _LABEL_BITS)
        check_layout(self.channel_layout, "channel_layout")
        check_layout(self.layout)
        if self.layout == "per_kv_head" and self.channel_layout == "per_query_head":
            raise ValueError('layout = "per_kv_head" needs channel_layout = "per_kv_head"')
        widths = {tensor.shape[-1] for tensor in self.channels.values()}
        if len(widths) != 1:
            raise ValueError(f"channels need the same number per head in every layer, not {widths}")
        self._settle(
            channels={layer: c.long().sort(dim=-1).values for layer, c in self.channels.items()},
            grids=dict(self.grids or {}),
        )

    @classmethod
    def usual(cls, context: UsualContext) -> DoubleSparsitySelector:
        """An eighth of the channels for each query head, 4-bit labels."""
        return cls.calibrate(
            context.calibrated, channels_per_head=context.head_dim // 8, label_bits=4
        )

    @property
    def channels_per_head(self) -> int:
        """r, the same in every layer."""
        return next(iter(self.channels.values())).shape[-1]

    @classmethod
    def calibrate(
        cls,
        captured: Iterable[CapturedRows],
        channels_per_head: int = 16,
        label_bits: int = 4,
        channel_layout: Layout = "per_query_head",
        layout: Layout = "per_query_head",
        grid: bool = False,
    ) -> DoubleSparsitySelector:
        """Picks the channels c with the largest mean |q_c k_c| over all pairs of captured q and k.

        Over all pairs that mean is mean |q_c| times mean |k_c|, so no pair is ever formed. Per KV
        head the group's query heads add up. Ties go to the lowest channel. grid: also fits `grids`.
        """
        layers = list(captured)
        queries = mean_by_layer(layers, lambda c: c.queries.abs())
        keys = mean_by_layer(layers, lambda c: c.keys.abs())
        channels = {}
        for layer, strength in queries.items():
            channels[layer] = _strongest(
                strength, keys[layer], channels_per_head, channel_layout == "per_kv_head"
            )
        made = cls(channels, label_bits, channel_layout, layout)
        return made._with_grids(layers) if grid else made

    def _with_grids(self, captured: Iterable[CapturedRows]) -> DoubleSparsitySelector:
        parts: dict[int, list[Tensor]] = {}
        for rows in captured:
            parts.setdefault(rows.layer, []).append(self._reduce(rows.layer, rows.keys[None])[0])
        fitted = {layer: fit_grid(torch.cat(p, 1), self.label_bits) for layer, p in parts.items()}
        return self._with(grids=fitted)

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """Labels of keys (B, KV heads, n, D): uint8 (B, heads, n, r) with float16 "low" and "step"
        (B, heads, n, 1), or float16 labels alone at 16 bits."""
        reduced = self._reduce(layer, keys)
        if self.label_bits == 16:
            return {"labels": reduced.half()}
        if self.grids:
            return {"labels": grid_labels(reduced, self.grids[layer], self.label_bits)}
        labels, low, step = quantise(reduced, self.label_bits)
        return {"labels": labels, "low": low, "step": step}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Estimated q.k over the channels, float32 (B, lists, q, n)."""
        reduced = self._reduce(layer, queries)
        own_scales = self.label_bits < 16 and not self.grids
        if own_scales:
            labels, low, step = quantise(reduced, self.label_bits)
            reduced = low.float() + step.float() * labels.float()
        batch, heads, rows, width = reduced.shape
        labels = view.index["labels"]
        if self.grids:
            labels = grid_values(labels, self.grids[layer])
        label_heads = labels.shape[1]
        reduced = reduced.float().reshape(batch, label_heads, -1, width)
        estimate = reduced @ labels.float().transpose(-1, -2)
        if own_scales:  # q.(low + step label) = low sum(q) + step q.label
            low, step = (view.index[name].float().transpose(-1, -2) for name in ("low", "step"))
            estimate = estimate * step + reduced.sum(dim=-1, keepdim=True) * low
        estimate = estimate.reshape(batch, heads, rows, -1)
        if self.layout == "per_kv_head":
            estimate = estimate.unflatten(1, (label_heads, -1)).sum(dim=2)
        return estimate

    def _shard(self, part: HeadSlice) -> DoubleSparsitySelector:
        return self._with(channels=part.of_layers(self.channels), grids=part.of_layers(self.grids))

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """`nominal_bits` with labels in whole bytes."""
        return self._bits(group, max(8, self.label_bits))

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """r label_bits, plus 32 for the token's minimum and step below 16 bits without grids, times
        the group for labels per query head. The paper's own accounting leaves out the 32."""
        return self._bits(group, self.label_bits)

    def _bits(self, group: int, label_bits: int) -> float:
        scales = 0 if self.label_bits == 16 or self.grids else _SCALE_BITS
        copies = group if self.channel_layout == "per_query_head" else 1
        return float(copies * (self.channels_per_head * label_bits + scales))

    def parameters(self) -> dict[str, Any]:
        """The channels' number, and the settings."""
        grid = {"grid": True} if self.grids else {}
        return {"channels_per_head": self.channels_per_head} | super().parameters() | grid

    def weights_sha256(self) -> str:
        """Of the calibrated channels, and of grids if there are any."""
        grids = {-1 - layer: grid for layer, grid in self.grids.items()}
        return tensors_sha256(dict(self.channels) | grids)

    def _reduce(self, layer: int, x: Tensor) -> Tensor:
        """The channels of x (B, H, n, D) that this layer's heads look at: (B, heads, n, r)."""
        if layer not in self.channels:
            raise ValueError(
                f"layer {layer} has no calibrated channels, only {sorted(self.channels)}; "
                "calibrate on a capture of it, or make it a dense layer"
            )
        channels = self.channels[layer].to(x.device)
        heads = max(x.shape[1], channels.shape[0])
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
        channels = channels.repeat_interleave(heads // channels.shape[0], dim=0)
        index = channels[None, :, None, :].expand(x.shape[0], -1, x.shape[2], -1)
        return x.gather(-1, index)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 labels, float16 low, float16 step) of x over its last axis: x ~ low + step * label.

    low and step are rounded to what is stored first, and the labels are the nearest to x with them.
    """
    levels = 2**bits - 1
    x = x.float()
    low = x.amin(dim=-1, keepdim=True).half()
    step = ((x.amax(dim=-1, keepdim=True) - low.float()) / levels).half()
    divisor = step.float().masked_fill(step == 0, 1.0)
    labels = ((x - low.float()) / divisor).round().clamp(0, levels)
    return labels.to(torch.uint8), low, step


def _strongest(queries: Tensor, keys: Tensor, count: int, per_kv_head: bool) -> Tensor:
    """Channels (heads, count) with the largest mean|q_c| mean|k_c|, from means (heads, D) each."""
    most = keys.shape[-1]
    require(0 < count <= most, "channels_per_head", count, f"within 1..{most}")
    strength = queries.view(*keys.shape[:1], -1, keys.shape[-1]) * keys[:, None]
    strength = strength.sum(dim=1) if per_kv_head else strength.flatten(0, 1)
    return strength.argsort(dim=-1, descending=True, stable=True)[:, :count]

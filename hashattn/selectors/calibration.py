"""What baselines learn from captured queries and keys before they run: moments by layer, head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor


class CapturedRows(Protocol):
    """The part of hashattn.hashing.capture.CapturedLayer that calibration reads.

    queries (query heads, rows, D) and keys (KV heads, n, D), both after the rotary embedding.
    """

    layer: int
    queries: Tensor
    keys: Tensor


def mean_by_layer(
    captured: Iterable[CapturedRows], values: Callable[[CapturedRows], Tensor]
) -> dict[int, Tensor]:
    """{layer: (heads, D) float32}: mean over tokens of values(c) (heads, tokens, D), all sequences.

    Raises ValueError when nothing was captured.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for rows in captured:
        tokens = values(rows)
        total = tokens.double().sum(dim=1)
        sums[rows.layer] = sums.get(rows.layer, torch.zeros_like(total)) + total
        counts[rows.layer] = counts.get(rows.layer, 0) + tokens.shape[1]
    if not sums:
        raise ValueError("calibration got no captured layers; capture at least one sequence")
    return {layer: (sums[layer] / counts[layer]).float() for layer in sorted(sums)}


def covariance_by_layer(
    captured: Iterable[CapturedRows], values: Callable[[CapturedRows], Tensor]
) -> dict[int, Tensor]:
    """{layer: (heads, D, D) float64}: covariance over tokens of values(c) (heads, tokens, D), all
    sequences. Raises ValueError when nothing was captured."""
    layers = list(captured)
    means = mean_by_layer(layers, values)
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for rows in layers:
        centred = values(rows).double() - means[rows.layer].double()[:, None]
        total = centred.mT @ centred
        sums[rows.layer] = sums.get(rows.layer, torch.zeros_like(total)) + total
        counts[rows.layer] = counts.get(rows.layer, 0) + centred.shape[1]
    return {layer: sums[layer] / counts[layer] for layer in means}


def tensors_sha256(tensors: Mapping[int, Tensor] | Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the keys, shapes, dtypes and bytes of {layer or name: tensor}."""
    digest = hashlib.sha256()
    for layer in sorted(tensors):
        tensor = tensors[layer].detach().cpu().contiguous()
        digest.update(f"{layer} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

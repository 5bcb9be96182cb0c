"""Uniform grids, one for each channel, fitted to captured values: they cost a token no bits."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE = 4096  # values of a channel that are looked at, evenly strided
_SPANS = (1.0, 2.0, 4.0, 8.0)  # deviations on either side of the mean, to begin with
_ROUNDS = 8  # of least squares: labels, then the line through their values


def fit_grid(values: Tensor, bits: int) -> Tensor:
    """Grids of 2^bits points, (heads, 2, channels): lowest point and step, of values (heads, n,
    channels) float.

    Nearest points have the least squared error of several local optima: few points are better spent
    where most values are than on the whole range.
    """
    values = values[:, :: max(1, values.shape[1] // _SAMPLE)].float()
    mean, spread = values.mean(1), values.std(1, correction=0).clamp_min(1e-12)
    least, best = torch.full_like(mean, torch.inf), torch.stack([mean, spread], 1)
    for span in _SPANS:
        grid = torch.stack([mean - span * spread, 2 * span * spread / (2**bits - 1)], 1)
        for _ in range(_ROUNDS):
            labels = grid_labels(values[None], grid, bits)[0].float()
            error = (labels * grid[:, 1:] + grid[:, :1] - values).square().sum(1)
            best = torch.where((error < least)[:, None], grid, best)
            least = torch.minimum(error, least)
            centre = labels.mean(1)
            away = labels - centre[:, None]
            slope = (away * values).sum(1) / away.square().sum(1).clamp_min(1e-12)
            step = torch.where(slope > 0, slope, spread)
            grid = torch.stack([mean - step * centre, step], 1)
    return best


def grid_labels(x: Tensor, grid: Tensor, bits: int) -> Tensor:
    """Labels, uint8, of the points nearest to x (B, heads, n, channels)."""
    low, step = grid.to(x.device)[:, :, None].unbind(1)
    return ((x.float() - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)


def grid_values(labels: Tensor, grid: Tensor) -> Tensor:
    """The points (B, heads, n, channels) float32 that these labels stand for."""
    low, step = grid.to(labels.device)[:, :, None].unbind(1)
    return low + step * labels.float()

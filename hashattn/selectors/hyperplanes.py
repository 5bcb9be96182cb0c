"""Random hyperplanes through the origin, with which SimHash and its kin hash."""

from __future__ import annotations

import torch
from torch import Tensor


class Hyperplanes:
    """N(0, 1) normals for every layer, fixed by seed and layer on every device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._normals: dict[tuple, Tensor] = {}

    def __call__(self, layer: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Normals of this shape, float32 on `device`; drawn on the CPU, once."""
        key = (layer, shape, device)
        if key not in self._normals:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            self._normals[key] = torch.randn(shape, generator=generator).to(device)
        return self._normals[key]

"""Random hyperplanes through the origin, what SimHash and its kin hash with."""

from __future__ import annotations

import torch
from torch import Tensor


class Hyperplanes:
    """Normals of N(0, 1) for every layer, fixed by seed and layer on every device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._drawn: dict[tuple, Tensor] = {}

    def __call__(self, layer: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Normals of this shape, float32 on `device`; drawn on the CPU, once."""
        key = (layer, shape, device)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            self._drawn[key] = torch.randn(shape, generator=generator).to(device)
        return self._drawn[key]

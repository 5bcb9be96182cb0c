"""How many cached tokens a query may attend to."""

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Sink, local and heavy tokens of every query (HashAttention, section 4).

    sink: first tokens, always attended. local: last tokens, always attended, the query's own
    token included. Exactly one of heavy (a number of tokens) and density (attended / visible
    tokens, sink and local counted in) says how many tokens the selector adds. All counts are
    over the visible tokens of a row, so left padding does not change them.
    """

    sink: int = 4
    local: int = 28
    heavy: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        _check_count("sink", self.sink, least=0)
        _check_count("local", self.local, least=1)
        if (self.heavy is None) == (self.density is None):
            raise ValueError(
                f"give exactly one of heavy and density, got heavy={self.heavy!r}, "
                f"density={self.density!r}"
            )
        if self.heavy is not None:
            _check_count("heavy", self.heavy, least=0)
        elif not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r}: must be in (0, 1], e.g. 1/16")

    @overload
    def heavy_tokens(self, n: int) -> int: ...
    @overload
    def heavy_tokens(self, n: Tensor) -> Tensor: ...
    def heavy_tokens(self, n):
        """Heavy tokens for n visible tokens; an int64 tensor of n's shape for a tensor."""
        fixed = self.sink + self.local
        if isinstance(n, Tensor):
            if self.heavy is not None:
                return torch.full_like(n, self.heavy, dtype=torch.int64)
            scaled = (n.to(torch.float64) * self.density).floor().to(torch.int64)
            return (scaled - fixed).clamp(min=0)
        if self.heavy is not None:
            return self.heavy
        return max(0, math.floor(self.density * n) - fixed)

    @overload
    def total(self, n: int) -> int: ...
    @overload
    def total(self, n: Tensor) -> Tensor: ...
    def total(self, n):
        """Tokens attended out of n visible ones when the selector spends its whole budget."""
        wanted = self.heavy_tokens(n) + self.sink + self.local
        return torch.minimum(wanted, n) if isinstance(n, Tensor) else min(wanted, n)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")

"""The small networks that turn keys or queries into codes, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

ACTIVATIONS = ("silu", "relu", "gelu", "tanh")


@dataclass(frozen=True, eq=False)
class Maps:
    """A stack of feed-forward maps, one a head.

    weights[s] (heads, in, out) and biases[s] (heads, out) float32 of stage s. activation: between
    the stages, one of ACTIVATIONS. steps (heads, folds, bits) float32: what each fold takes from
    the size of a pre-activation before its sign is taken (`reference.preactivations`); None: no
    folds, as in the paper.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: str = "silu"
    steps: Tensor | None = None

    @property
    def heads(self) -> int:
        """Maps in the stack."""
        return self.weights[0].shape[0]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.weights[-1].shape[2]

    @property
    def folds(self) -> int:
        """Folds of the pre-activations."""
        return 0 if self.steps is None else self.steps.shape[1]

    @cached_property
    def half(self) -> bool:
        """Whether bfloat16, in half the bytes, holds every weight exactly."""
        return all(bool((w == w.bfloat16().float()).all()) for w in self.weights)

    def rounded(self) -> Maps:
        """The same maps with weights rounded to bfloat16 (still stored as float32)."""
        weights = tuple(w.bfloat16().float() for w in self.weights)
        return replace(self, weights=weights)

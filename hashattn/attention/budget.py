"""How many cached tokens a query may attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hashattn.base.checks import INT32_MAX, is_count, is_number, require
from hashattn.selectors.plan import SelectionPlan

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice


@dataclass(frozen=True)
class Budget:
    """Sink, local and heavy tokens of every query (HashAttention, section 4).

    sink: first tokens, always attended. local: last tokens, always attended, the query's own
    token included. Exactly one of heavy (a number of tokens) and density (attended / visible
    tokens, sink and local counted in) says how many tokens the selector adds. All counts are
    over the visible tokens of a row, so left padding does not change them.

    shares: how layers and heads share the heavy tokens, None for evenly: for every model layer a
    factor for each KV head, or one for all of them. Their mean over layers and heads is 1, so heavy
    and density remain what is read on average (`evaluation.measures.allocation` computes them).
    Raises ValueError naming the field, its value and what is allowed.
    """

    sink: int = 4
    local: int = 28
    heavy: int | None = None
    density: float | None = None
    shares: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field, least in (("sink", 0), ("local", 1)):
            _require_count(field, getattr(self, field), least)
        if (self.heavy is None) == (self.density is None):
            raise ValueError(
                f"give exactly one of heavy and density, got heavy = {self.heavy!r}, "
                f"density = {self.density!r}"
            )
        if self.heavy is not None:
            _require_count("heavy", self.heavy, 0)
        else:
            valid = is_number(self.density) and 0 < self.density <= 1
            require(valid, "density", self.density, "a number in (0, 1], e.g. 1/16")
        if self.shares is not None:
            _check_shares(self.shares)
            object.__setattr__(self, "shares", tuple(tuple(map(float, s)) for s in self.shares))

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
        """Tokens attended of n visible ones when the selector spends its whole budget; an int64
        tensor of n's shape for a tensor."""
        tokens = self.heavy_tokens(n) + self.sink + self.local
        return torch.minimum(tokens, n) if isinstance(n, Tensor) else min(tokens, n)

    def of_layer(
        self,
        plan: SelectionPlan,
        layer: int,
        kv_heads: int,
        lists: int,
        part: HeadSlice | None = None,
    ) -> SelectionPlan:
        """`plan`, of this budget, with the heavy tokens of a layer by its shares.

        plan.heavy (batch, 1, q) becomes (batch, lists, q). lists: token lists of the layer,
        kv_heads or a multiple. part: which heads these are, where they are not all. ValueError for
        a layer or a number of KV heads that `shares` does not have.
        """
        if self.shares is None:
            return plan
        model_heads = kv_heads if part is None else part.kv_heads
        if layer >= len(self.shares) or len(self.shares[layer]) not in (1, model_heads):
            raise ValueError(
                f"shares = {self.shares!r}: must be one factor, or one for each of "
                f"the {model_heads} KV heads of layer {layer}; allocate them for this model"
            )
        factors = self.shares[layer]
        if part is not None and len(factors) > 1:
            factors = part.of(factors)
        scale = torch.tensor(factors, dtype=torch.float64, device=plan.heavy.device)
        scale = scale.repeat_interleave(lists // len(factors))[:, None]
        most_heavy = math.ceil(max(factors) * self.heavy_tokens(plan.n))
        return replace(
            plan,
            heavy=(plan.heavy * scale).floor().long(),
            width=min(plan.n, self.sink + self.local + most_heavy),
        )


def _check_shares(shares: Sequence[Sequence[float]]) -> None:
    valid = isinstance(shares, list | tuple) and all(isinstance(s, list | tuple) for s in shares)
    valid = valid and all(is_number(f) and f >= 0 for layer in shares for f in layer)
    if valid:
        heads = max((len(layer) for layer in shares), default=0)
        valid = bool(shares) and all(len(layer) in (1, heads) for layer in shares) and heads > 0
    require(
        valid, "shares", shares,
        "a list of factors for each layer, all at least 0, one for each KV head or one for all",
    )  # fmt: skip
    mean = sum(sum(layer) / len(layer) for layer in shares) / len(shares)
    require(math.isclose(mean, 1.0, abs_tol=1e-3), "shares", shares,
            f"1 on average; their mean is {mean:.4f}")  # fmt: skip


def _require_count(field: str, value: object, least: int) -> None:
    valid = is_count(value, least, INT32_MAX)
    require(valid, field, value, f"an integer from {least} to {INT32_MAX}, the range of int32")

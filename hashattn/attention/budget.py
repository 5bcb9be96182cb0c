"""How many cached tokens a query may attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hashattn.base.checks import INT32_MAX, is_count, is_number, require
from hashattn.kernels import Coins, room_for
from hashattn.selectors.plan import Draw, SelectionPlan, drawn_tokens

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice


_SEED_MAX = 2**64 - 1


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

    sampled: which part of the heavy tokens is drawn, with probabilities by the selector's estimate
    of the logits, and stands for all that are not read (priority sampling); the rest is ranked. One
    number, or like shares one for each KV head of each layer. The number read is then the budget's
    on average. seed, fresh: of the coins that decide, new ones at every step if fresh; trust: see
    `kernels.sample`.
    Raises ValueError naming the field, its value and what is allowed.
    """

    sink: int = 4
    local: int = 28
    heavy: int | None = None
    density: float | None = None
    shares: tuple[tuple[float, ...], ...] | None = None
    sampled: float | tuple[tuple[float, ...], ...] = 0.0
    seed: int = 0
    fresh: bool = True
    trust: float = 0.1

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
            _check_by_layer("shares", self.shares, math.inf)
            mean = sum(sum(layer) / len(layer) for layer in self.shares) / len(self.shares)
            require(math.isclose(mean, 1.0, abs_tol=1e-3), "shares", self.shares,
                    f"1 on average; their mean is {mean:.4f}")  # fmt: skip
            object.__setattr__(self, "shares", _as_tuples(self.shares))
        if not is_number(self.sampled):
            _check_by_layer("sampled", self.sampled, 1)
            object.__setattr__(self, "sampled", _as_tuples(self.sampled))
        else:
            require(0 <= self.sampled <= 1, "sampled", self.sampled, "a number in [0, 1]")
        valid = is_count(self.seed, 0, _SEED_MAX)
        require(valid, "seed", self.seed, "an integer from 0 to 2^64 - 1")
        valid = is_number(self.trust) and 0 < self.trust <= 1
        require(valid, "trust", self.trust, "a number in (0, 1]")

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
        if self.shares is None and not self.sampled:
            return plan
        if self.shares is not None:
            plan = self._shared(plan, layer, kv_heads, lists, part)
        return self._drawn(plan, layer, kv_heads, lists, part) if self.sampled else plan

    def _drawn(
        self, plan: SelectionPlan, layer: int, kv_heads: int, lists: int, part: HeadSlice | None
    ) -> SelectionPlan:
        """`plan` with the heavy tokens of a layer that are drawn."""
        share = self.sampled
        if isinstance(share, tuple):
            if layer < len(share) and not any(share[layer]):
                return plan
            share = self._of_heads("sampled", layer, kv_heads, lists, part, plan.heavy.device)
            tokens = drawn_tokens(plan.heavy, share)
        else:
            tokens = plan.part(share)
        first = 0 if part is None else part.rank * lists
        coins = Coins(self.seed, layer, first, self.fresh)
        width = min(plan.n, room_for(0, plan.width))  # more may be drawn than is expected
        return replace(plan, draw=Draw(tokens, coins, self.trust, share), width=width)

    def _shared(
        self, plan: SelectionPlan, layer: int, kv_heads: int, lists: int,
        part: HeadSlice | None = None,
    ) -> SelectionPlan:  # fmt: skip
        scale = self._of_heads("shares", layer, kv_heads, lists, part, plan.heavy.device)
        most_heavy = math.ceil(max(self.shares[layer]) * self.heavy_tokens(plan.n))
        return replace(
            plan,
            heavy=(plan.heavy * scale).floor().long(),
            width=min(plan.n, self.sink + self.local + most_heavy),
        )

    def factors(
        self, layer: int, kv_heads: int, lists: int, part: HeadSlice | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """A layer's `shares` and `sampled` on a device, (lists, 1) float64 each; None for even
        shares, and where nothing is drawn or of all lists the same."""
        shares = sampled = None
        if self.shares is not None:
            shares = self._of_heads("shares", layer, kv_heads, lists, part, device)
        if isinstance(self.sampled, tuple):
            if any(self.sampled[layer]):
                sampled = self._of_heads("sampled", layer, kv_heads, lists, part, device)
        elif self.sampled and shares is not None:
            sampled = torch.full((lists, 1), self.sampled, dtype=torch.float64, device=device)
        return shares, sampled

    def _of_heads(
        self, field: str, layer: int, kv_heads: int, lists: int, part: HeadSlice | None,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """A layer's numbers of a field, (lists, 1) float64."""
        value, model_heads = getattr(self, field), kv_heads if part is None else part.kv_heads
        if layer >= len(value) or len(value[layer]) not in (1, model_heads):
            raise ValueError(
                f"{field} = {value!r}: must be one factor, or one for each of the {model_heads} KV "
                f"heads of layer {layer}; allocate them for this model"
            )
        numbers = value[layer]
        if part is not None and len(numbers) > 1:
            numbers = part.of(numbers)
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        return numbers.repeat_interleave(lists // len(numbers))[:, None]


def _check_by_layer(field: str, value: object, most: float) -> None:
    valid = isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value)
    valid = valid and all(is_number(f) and 0 <= f <= most for layer in value for f in layer)
    if valid:
        heads = max((len(layer) for layer in value), default=0)
        valid = bool(value) and all(len(layer) in (1, heads) for layer in value) and heads > 0
    limits = "all at least 0" if most == math.inf else f"all from 0 to {most}"
    require(
        valid, field, value,
        f"a list of factors for each layer, {limits}, one for each KV head or one for all",
    )  # fmt: skip


def _as_tuples(value: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, layer)) for layer in value)


def _require_count(field: str, value: object, least: int) -> None:
    valid = is_count(value, least, INT32_MAX)
    require(valid, field, value, f"an integer from {least} to {INT32_MAX}, the range of int32")

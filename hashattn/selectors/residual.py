"""A selector's top tokens plus a uniform sample of the rest (vAttention, Desai et al. 2025).

The tokens that top-k leaves out have little weight each, but may have much together. Of these n_s
tokens, the residual, B are sampled; each stands for n_s / B of them: its logit grows by
log(n_s / B), and numerator and denominator of the softmax become unbiased estimates. Drawn by the
base's estimated weights instead of evenly, it stands for what it was likely to stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require, require_one_of
from hashattn.kernels import gather_tokens, indices_to_mask, mask_to_indices
from hashattn.selectors.base import KeyView
from hashattn.selectors.logits import listed_logits
from hashattn.selectors.plan import SelectionPlan
from hashattn.selectors.random import RandomSelector
from hashattn.selectors.usual import MethodStyle, UsualContext
from hashattn.selectors.wrapper import WrapperSelector

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

_PROPOSALS = ("uniform", "weights")


@dataclass(frozen=True, eq=False)
class ResidualSelector(WrapperSelector):
    """The best tokens of `base` and a uniform sample, without replacement, of all others.

    share: part of the heavy budget that is sampled; the rest is `base`'s. Without epsilon that is
    all. With epsilon and delta the sample grows beyond the budget, row by row, until the softmax
    denominator is within a relative error of epsilon with probability 1 - delta, by the central
    limit theorem (vAttention, section 4): B = (z sigma n_s / (epsilon D))^2, z the normal quantile
    at 1 - delta / 2, sigma and the denominator D estimated from a base sample of `share` and the
    tokens that are read anyway. No token outside these is looked at. Sampling without replacement
    needs fewer: B / (1 + B / n_s). Lists per KV head take what the neediest head of a group needs.

    proposal "weights": the sample's tokens are drawn by the base's estimated weights w, as in
    vAttention's successor (skylight-org/skylight-research, pull request 92): with the probability
    1 - (1 - w / sum w)^B with which B draws with replacement hold a token, and weights to match.
    The coins of tokens are independent, so that the number of tokens varies. Such a sample has no
    epsilon; Budget.sampled is the same idea with fewer tokens drawn twice.
    ValueError for a share, epsilon or delta outside (0, 1), one without the other, another
    proposal, or epsilon with weights.
    """

    name = "residual"
    style = MethodStyle("#6699cc", "8", "HashAttention and a sample")

    share: float = 0.5
    epsilon: float | None = None
    delta: float | None = None
    seed: int = 0
    proposal: str = "uniform"

    def __post_init__(self) -> None:
        require_one_of("proposal", self.proposal, _PROPOSALS)
        epsilon, delta = self.epsilon, self.delta
        if (epsilon is None) != (delta is None):
            raise ValueError(f"epsilon = {epsilon!r} and delta = {delta!r}: give both or neither")
        if epsilon is not None and self.proposal != "uniform":
            raise ValueError(
                f"epsilon = {epsilon} says how many tokens a uniform sample needs, and proposal = "
                f'{self.proposal!r}: give one, or use proposal = "uniform"'
            )
        for name, value in (("share", self.share), ("epsilon", epsilon), ("delta", delta)):
            require(value is None or 0 < value < 1, name, value, "between 0 and 1")
        super().__post_init__()
        self._settle(order=RandomSelector(self.seed))

    @classmethod
    def usual(cls, context: UsualContext) -> ResidualSelector:
        """A quarter of the budget beside the hash selector's best tokens."""
        from hashattn.selectors.hash import HashSelector  # only the usual base needs it

        return cls(HashSelector.usual(context), share=0.25, seed=context.seed)

    def parameters(self) -> dict[str, Any]:
        """As of every wrapper; the proposal only where it is not the uniform one, so that results
        from before there was another are found again."""
        settings = super().parameters()
        if self.proposal == "uniform":
            del settings["proposal"]
        return settings

    def _shard(self, part: HeadSlice) -> ResidualSelector:
        return self._with(base=self.base.shard(part), order=self.order.shard(part))

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (B, lists, q, m) int32, -1 padded, of all that is read, the sample included."""
        return self.sample(layer, queries, view, scaling, plan)[0]

    def sample(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> tuple[Tensor, Tensor]:
        """Indices (B, lists, q, m) int32, -1 padded, and log weights of this shape, float32: 0 for
        what the base chose, log(n_s / B) for the sample."""
        sample_size = (plan.heavy * self.share).round().long()
        base_plan = replace(plan, heavy=plan.heavy - sample_size)
        best = indices_to_mask(self.base.select(layer, queries, view, scaling, base_plan), plan.n)
        residual = plan.seen & ~best
        if self.proposal == "weights":
            return self._by_weights(layer, queries, view, scaling, best, sample_size, residual)
        rank = self.order.places(layer, queries, view, residual)
        n_s = residual.sum(dim=-1)  # (B, lists, q)
        count = torch.minimum(sample_size, n_s)
        if self.epsilon is not None:
            base_sample = rank < count[..., None]
            needed = self._needed(queries, view.keys, scaling, best, base_sample, n_s)
            count = torch.minimum(torch.maximum(needed, count), n_s)
        sampled = rank < count[..., None]
        indices = mask_to_indices(best | sampled)
        weight = (n_s / count.clamp(min=1)).log()[..., None]
        at = indices.clamp(min=0).long()
        return indices, torch.where(sampled.gather(-1, at), weight, 0.0).float()

    def _by_weights(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, best: Tensor,
        draws: Tensor, residual: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`sample` by the base's estimates, of `residual`, the tokens beside `best`, both
        (B, lists, q, n); draws (B, 1 or lists, q): B of the class's docstring."""
        logits = self.base.estimates(layer, queries, view, scaling).double()
        shares = logits.masked_fill(~residual, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        # log(1 - (1 - share)^draws), also where that is next to nothing
        missed = draws[..., None] * torch.log1p(-shares)
        chance = -torch.expm1(missed)
        coins = self.order.scores(layer, queries, view, scaling)
        coins = coins.repeat_interleave(residual.shape[1] // coins.shape[1], dim=1)
        sampled = residual & ((coins + 0.5) / 2**31 < chance)
        indices = mask_to_indices(best | sampled)
        at = indices.clamp(min=0).long()
        weight = -chance.gather(-1, at).clamp(min=torch.finfo(torch.float64).tiny).log()
        return indices, torch.where(sampled.gather(-1, at), weight, 0.0).float()

    def _needed(
        self, queries: Tensor, keys: Tensor, scaling: float, best: Tensor, base_sample: Tensor,
        n_s: Tensor,
    ) -> Tensor:  # fmt: skip
        """Tokens to sample for epsilon and delta, B of the class's docstring: int64 (B, lists, q)
        of masks best and base_sample (B, lists, q, n) and n_s (B, lists, q)."""
        read = mask_to_indices(best | base_sample)
        at = read.clamp(min=0).long()
        logits = listed_logits(queries, gather_tokens(keys, read)) * scaling
        logits = logits.masked_fill((read < 0)[:, :, :, None], -torch.inf)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        sampled = base_sample.gather(-1, at)[:, :, :, None] & (read >= 0)[:, :, :, None]
        count = sampled.sum(dim=-1).clamp(min=1)
        mean = (weights * sampled).sum(dim=-1) / count
        squares = (weights - mean[..., None]) ** 2 * sampled
        variance = squares.sum(dim=-1) / (count - 1).clamp(min=1)
        n_s = n_s[..., None].double()
        denominator = (weights * ~sampled).sum(dim=-1) + n_s * mean
        z = NormalDist().inv_cdf(1 - self.delta / 2)
        size = (z * variance.double().sqrt() * n_s / (self.epsilon * denominator)) ** 2
        size = size / (1 + size / n_s.clamp(min=1))  # without replacement
        return size.amax(dim=-1).ceil().long()

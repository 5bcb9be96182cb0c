"""The error bar of a sampled step: how far it may be from dense attention, by the sample itself.

The output o = sum(w v) / sum(w), w = exp(logit) / p for a token drawn with probability p, is a
ratio of two unbiased sums. By the delta method its variance is that of sum a (v - o), a the
attention weights that dense attention would give, of which sum (1 - p) a'^2 |v - o|^2 over the
tokens drawn, a' = w / sum(w), is the unbiased estimate of Horvitz and Thompson for coins that are
independent (Särndal, Swensson and Wretman 1992, sections 2.8 and 5.6). Tokens that are read for
certain add nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.hashing.labels import capped
from hashattn.kernels import gather_tokens
from hashattn.selectors.logits import listed_logits

if TYPE_CHECKING:
    from hashattn.attention.observer import LayerStep


@torch.no_grad()
def sampling_error(step: LayerStep) -> Tensor | None:
    """Expected |o - o_dense| of every row, estimated, float32 (batch, heads, q), in units of the
    values; None for a step that is dense or drew nothing.

    Reads K and V of the listed tokens once more.
    """
    if step.log_weights is None or step.indices is None or step.view is None:
        return None
    rows = [gather_tokens(states, step.indices) for states in (step.view.keys, step.values)]
    return sample_statistics(step.query, *rows, step.indices, step.log_weights, **step.logits)[0]


@torch.no_grad()
def sample_statistics(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, log_weights: Tensor, *,
    scaling: float, softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of lists that were drawn, float32 (batch, heads, q) each: expected |o - o_dense|, estimated,
    and which part of the weight the tokens have that were drawn.

    query (B, heads, q, D), indices and log_weights (B, lists, q, m), keys and values of these
    tokens (B, lists, q, m, D), the rest as of `kernels.attend`.
    """
    logits = listed_logits(query, keys)  # (B, L, q, r, m)
    logits = capped(logits * scaling, softcap)
    added = log_weights[:, :, :, None]
    logits = (logits + added).masked_fill((indices < 0)[:, :, :, None], -torch.inf)
    shares = logits.softmax(-1)
    if sinks is not None:  # they take weight and have no value
        extra = sinks.float().view(1, logits.shape[1], 1, -1, 1)
        shares = (logits - torch.logaddexp(logits.logsumexp(-1, keepdim=True), extra)).exp()
    rows = values.float()
    out = shares @ rows
    squares = (rows * rows).sum(-1)[:, :, :, None] - 2 * out @ rows.mT
    squares = (squares + (out * out).sum(-1, keepdim=True)).clamp(min=0)
    variance = (-torch.expm1(-added) * shares.square() * squares).sum(-1)  # (B, L, q, r)
    drawn = (shares * (added > 0)).sum(-1)
    return tuple(part.transpose(2, 3).flatten(1, 2) for part in (variance.sqrt(), drawn))

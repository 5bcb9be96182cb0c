"""What one query row read beside what dense attention would have weighted, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.hashing.labels import capped
from hashattn.kernels import indices_to_mask
from hashattn.selectors.logits import inner_products

if TYPE_CHECKING:
    from hashattn.attention.observer import LayerStep


@dataclass(frozen=True)
class RowWeights:
    """Attention weights of one query row of one layer over its n cached tokens.

    dense, read (heads, n) float32: of dense attention, and of attention over what was read, drawn
    tokens by their log weights. Each sums to 1, or less where learned sinks take a part. listed
    (lists, n) bool: the tokens read, a list for each KV head or for each query head.
    """

    dense: Tensor
    read: Tensor
    listed: Tensor

    @property
    def missed(self) -> Tensor:
        """Dense weight of the tokens that were not read, (heads, n) float32."""
        group = self.dense.shape[0] // self.listed.shape[0]
        return self.dense.masked_fill(self.listed.repeat_interleave(group, dim=0), 0)


@torch.no_grad()
def row_weights(step: LayerStep, row: int = 0) -> RowWeights:
    """RowWeights of query row `row` of a step of batch 1 whose view is known.

    softmax(scaling * q . k), capped and with sinks as the layer has them, over the tokens that the
    row sees. Reads all keys. A dense step reads what it sees, so nothing is missed.
    """
    rows, sinks = step.query.shape[2], step.logits["sinks"]
    logits = exact_logits(step, slice(row, row + 1))[0, :, 0]
    if step.indices is None:
        seen = step.view.causal(rows)[0, 0, row]
        dense = _softmax(logits.masked_fill(~seen, -torch.inf), sinks)
        return RowWeights(dense, dense, seen[None])
    dense = _softmax(logits.masked_fill(~step.plan.seen[0, 0, row], -torch.inf), sinks)
    indices = step.indices[0, :, row]
    listed = indices_to_mask(indices, step.n)
    group = len(logits) // len(listed)
    if step.log_weights is not None:
        padded = logits.new_zeros(len(listed), step.n + 1)
        slots = torch.where(indices < 0, step.n, indices).long()
        added = padded.scatter_(-1, slots, step.log_weights[0, :, row].float())[:, : step.n]
        logits = logits + added.repeat_interleave(group, dim=0)
    unread = ~listed.repeat_interleave(group, dim=0)
    return RowWeights(dense, _softmax(logits.masked_fill(unread, -torch.inf), sinks), listed)


def exact_logits(step: LayerStep, rows: slice = slice(None)) -> Tensor:
    """Attention logits of query rows over all keys, scaled and capped as the layer has it, float32
    (batch, heads, rows, n), whether a row sees the token or not."""
    logits = inner_products(step.query[:, :, rows], step.view.keys) * step.logits["scaling"]
    return capped(logits, step.logits["softcap"])


def log_total(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Logarithm of the softmax sum of logits (..., heads, q, n), learned sinks (heads,) counted:
    (..., heads, q, 1)."""
    total = logits.logsumexp(-1, keepdim=True)
    return total if sinks is None else torch.logaddexp(total, sinks.float()[:, None, None])


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of logits (heads, n), -inf where nothing is read; sinks take theirs."""
    total = log_total(logits[:, None], sinks)[:, 0]
    return (logits - total).exp().nan_to_num(0)  # a row that reads nothing gives no weight

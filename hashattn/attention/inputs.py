"""The arguments of one call of the attention function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hashattn.models.dense import dense_attention
from hashattn.models.families import logit_cap, softmax_sinks


@dataclass(frozen=True)
class Inputs:
    """What transformers passes to an attention function, shapes as in dispatch.forward.

    others: its further keyword arguments.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    dropout: float
    others: dict[str, Any]

    def logits(self) -> dict[str, Any]:
        """Keywords of `attend`: scaling and cap of q.k, and learned sinks of the softmax."""
        sinks = softmax_sinks(self.module, self.others)
        return {"scaling": self.scaling, "softcap": logit_cap(self.others), "sinks": sinks}

    def dense(self, eager: bool) -> tuple[Tensor, Tensor | None]:
        """The model's own attention: output (batch, q, heads, head_dim) and weights or None."""
        return dense_attention(
            self.module, self.query, self.key, self.value, self.mask, eager=eager,
            scaling=self.scaling, dropout=self.dropout, **self.others,
        )  # fmt: skip

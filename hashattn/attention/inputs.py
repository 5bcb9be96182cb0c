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

    others: its further keyword arguments. computed: where key and value were read from a store, the
    newest ones as they were before.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    dropout: float
    others: dict[str, Any]
    computed: tuple[Tensor, Tensor] | None = None

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, kv_heads, at most n, head_dim) that end at the newest of n
        tokens, as they were computed."""
        states = self.computed or (self.key, self.value)
        return tuple(part if part.shape[2] <= n else part[:, :, :n] for part in states)

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

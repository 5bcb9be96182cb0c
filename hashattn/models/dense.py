"""Dense attention as the model does it: for capture, and for the calls that stay dense."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.models.families import logit_cap, softmax_sinks


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eager: bool,
    scaling: float | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention output (batch, q, heads, head_dim) and weights (None from SDPA).

    query: (batch, heads, q, head_dim); key and value: (batch, kv_heads, n, head_dim);
    attention_mask: (batch, 1, q, n), True or 0.0 where a row may attend, or None.

    Models with a logit cap or sinks, which SDPA does not compute, and those loaded as eager use the
    eager function of their modeling file.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    special = logit_cap(kwargs) is not None or softmax_sinks(module, kwargs) is not None
    if not (eager or special):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None and query.shape[2] > 1:
        # no mask means causal from token 0 on: an empty static cache has more room than q
        q_len = query.shape[2]
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        attention_mask = query.new_ones(q_len, q_len, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = query.new_zeros(()).where(attention_mask, lowest)
    forward = sys.modules[type(module).__module__].eager_attention_forward
    return forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )

"""Attention by loops in float64, for the selectors that observe it."""

import math

import torch

from hashattn.selectors.base import KeyView

B, HEADS, KV_HEADS, D = 2, 4, 2, 8
GROUP = HEADS // KV_HEADS
SCALING = D**-0.5


def random_qk(n, seed=7):
    """Queries (B, HEADS, n, D) of every token, as a model's transposed views, and its keys."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, n, HEADS, D, generator=generator).transpose(1, 2) * 2
    return queries, torch.randn(B, KV_HEADS, n, D, generator=generator)


def attention(queries, keys, b, kv, position, tokens):
    """{token: weight} over `tokens` for the queries at `position`, mean over a group."""
    weights = dict.fromkeys(tokens, 0.0)
    for head in range(kv * GROUP, (kv + 1) * GROUP):
        q = queries[b, head, position].double()
        terms = {t: math.exp(float(q @ keys[b, kv, t].double()) * SCALING) for t in tokens}
        total = sum(terms.values())
        for t, term in terms.items():
            weights[t] += term / total / GROUP
    return weights


def observe(selector, queries, keys, first, last, state, read=None, visible=None):
    """The selector's state after one call with the tokens [first, last)."""
    visible = None if visible is None else visible[:, :last]
    view = KeyView(keys[:, :, :last], state, visible)
    return selector.observe(0, queries[:, :, first:last], view, SCALING, read)

"""How alike the query heads of a group are: what sharing one selection among them can cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch

from hashattn.evaluation.measures.selection import ROWS_AT_ONCE, best_tokens, rows_with_candidates
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.labels import attention_logits, candidate_mask


def group_overlap(
    captured: Iterable[CapturedLayer], top: Sequence[int], sink: int = 4, local: int = 28
) -> list[dict[str, Any]]:
    """A row for each captured layer, KV head and k in `top`: how the true top k tokens of its query
    heads (by q.k outside sink and local) agree.

    Columns: layer, head (the KV head), length, k, overlap (share of a head's top k that another
    head of the group has too, mean over pairs and rows), chance (the same of random tokens), union
    (distinct tokens in the group's lists, over k: 1 if all agree, the group's size if none do).
    Rows that see fewer than k tokens outside sink and local are left out; ValueError if none is
    left, or if a group has one head.
    """
    table = []
    for layer in captured:
        kv_heads, n = layer.keys.shape[:2]
        group = len(layer.queries) // kv_heads
        if group < 2:
            raise ValueError(f"layer {layer.layer}: every KV head has one query head, no group")
        for k in top:
            shared, union, chance = [], [], []
            for rows in rows_with_candidates(layer, sink, local, least=k).split(ROWS_AT_ONCE):
                positions = layer.positions[rows]
                allowed = candidate_mask(positions, n, sink, local)
                logits = attention_logits(
                    layer.queries[:, rows], layer.keys, layer.scaling, layer.softcap
                )
                best = best_tokens(logits.masked_fill(~allowed, float("-inf")), k)
                in_top = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                in_top = in_top.scatter(-1, best, True).unflatten(0, (kv_heads, group))
                pairs = [
                    (in_top[:, a] & in_top[:, b]).sum(-1) for a, b in combinations(range(group), 2)
                ]
                shared.append(torch.stack(pairs).double().mean(0) / k)
                union.append(in_top.any(1).sum(-1) / k)
                chance.append(k / allowed.sum(-1))
            means = [torch.cat(parts, -1).double().mean(-1) for parts in (shared, union)]
            table += [
                {
                    "layer": layer.layer, "head": head, "length": n, "k": k,
                    "overlap": float(means[0][head]), "chance": float(torch.cat(chance).mean()),
                    "union": float(means[1][head]),
                }
                for head in range(kv_heads)
            ]  # fmt: skip
    return table

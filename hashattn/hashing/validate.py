"""How well hard codes select: recall of the true top tokens and attention mass, at a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.labels import attention_mass, candidate_mask
from hashattn.hashing.maps import LayerMaps
from hashattn.kernels import encode, grade_bits, hamming_scores, indices_to_mask, select

METRICS = ("recall@4", "recall@32", "mass")


def selected_tokens(
    maps: LayerMaps,
    captured: CapturedLayer,
    *,
    sink: int,
    local: int,
    fraction: int,
    group: str = "each",
) -> Tensor:
    """Tokens the codes select, bool (Hq, r, n): visible // fraction (at least one) of each row's
    candidates by score, ties to the lowest index.

    group "sum": one selection per key map, by matching bits; "each": one per query head, by graded
    ones (TrainRecipe.group).
    """
    allowed = candidate_mask(captured.positions, captured.keys.shape[1], sink, local)
    if group == "each":
        queries = grade_bits(maps.query(captured.queries[None]), **maps.grades)
    else:
        queries = encode(captured.queries[None], maps.query)
    scores = hamming_scores(queries, encode(captured.keys[None], maps.key))
    # The kernels' selection, but not attention.Budget's rule (of a room above, too): its density
    # counts sink and local in, which leaves early rows nothing to be judged by, and its number of
    # tokens is most of what they see. Another rule would also have early stopping keep other maps,
    # so that no weights trained before could be trained again.
    heavy = ((captured.positions + 1) // fraction).clamp_min(1)
    mandatory = torch.zeros_like(allowed)  # sink and local, read whatever the hash: not judged here
    indices = select(scores, heavy[None, None], allowed[None, None], mandatory[None, None])[0]
    selected = indices_to_mask(indices, captured.keys.shape[1])
    return selected.repeat_interleave(len(captured.queries) // len(selected), 0)


def _top_recall(mass: Tensor, selected: Tensor, k: int) -> Tensor:
    """Share (Hq, r) of the k heaviest candidates that is selected; mass, selected (Hq, r, n), where
    mass is -1 for what is no candidate."""
    best = mass.topk(min(k, mass.shape[-1]), -1)
    real = best.values >= 0
    hits = (selected.gather(-1, best.indices) & real).sum(-1)
    return hits / real.sum(-1).clamp_min(1)


def selection_quality(
    maps: LayerMaps,
    captures: Sequence[CapturedLayer],
    *,
    sink: int,
    local: int,
    fraction: int = 32,
    group: str = "each",
) -> dict[str, float]:
    """Means over query heads and rows of all captures, with visible // fraction tokens selected.

    recall@k: share of the k heaviest candidates that is selected. mass: share of the attention
    on candidates that is selected, rows weighted by how much attention their candidates get.
    Rows without candidates do not count.
    """
    recalls: dict[str, list[Tensor]] = {"recall@4": [], "recall@32": []}
    selected_mass, candidate_total = torch.tensor(0.0), torch.tensor(0.0)
    for captured in captures:
        mass = attention_mass(
            captured.queries, captured.keys, captured.positions, captured.scaling, captured.softcap
        )
        selected = selected_tokens(
            maps, captured, sink=sink, local=local, fraction=fraction, group=group
        )
        allowed = candidate_mask(captured.positions, mass.shape[-1], sink, local)
        rows = allowed.any(-1)
        candidate = mass.masked_fill(~allowed, -1.0)[:, rows]
        for k in (4, 32):
            recalls[f"recall@{k}"].append(_top_recall(candidate, selected[:, rows], k).flatten())
        selected_mass = selected_mass + (mass * selected).sum().cpu()
        candidate_total = candidate_total + (mass * allowed).sum().cpu()
    result = {name: float(torch.cat(parts).mean()) for name, parts in recalls.items()}
    return result | {"mass": float(selected_mass / candidate_total.clamp_min(1e-12))}

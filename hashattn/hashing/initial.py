"""Where hash training starts: input statistics, and maps that already are a good linear hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hashattn.hashing.maps import HashConfig, HashMap, LayerMaps

_RIDGE = 1e-4  # of the mean eigenvalue, so that inverse roots of rank-deficient moments stay finite
NOISE = 0.02  # of a stage's fan-in bound, so that no hidden unit starts as a copy of another


def moments(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per head and channel, (heads, dim), of (heads, n, dim)."""
    x = torch.cat([s.float() for s in samples], 1)
    std = x.std(1, correction=0)
    # a constant channel carries nothing; dividing by its rounding noise would amplify it
    return x.mean(1), torch.maximum(std, 1e-3 * std.amax(-1, keepdim=True)).clamp_min(1e-6)


def _root(moment: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0) + _RIDGE * values.mean().clamp_min(1e-12)
    return vectors * values**power @ vectors.T


def second_moment(x: Tensor) -> Tensor:
    """(dim, dim) of x (n, dim)."""
    return x.T @ x / len(x)


def interaction_directions(cq: Tensor, ck: Tensor) -> tuple[Tensor, Tensor]:
    """Directions in which q.k varies most: (dim, dim) each, best first.

    With Cq the second moment of queries and Ck the covariance of keys, (dim, dim) each, the SVD
    U S V^T of Cq^1/2 Ck^1/2 gives q.k = sum_i (q.a_i)(k.b_i) with a = Cq^-1/2 U S^1/2,
    b = Ck^-1/2 V S^1/2, and (q.a_i)(k.b_i) of size S_i. Keys are centred: a constant added to
    every key moves all scores of a query alike.
    """
    u, s, vt = torch.linalg.svd(_root(cq, 0.5) @ _root(ck, 0.5))
    return ((_root(cq, -0.5) @ u * s.sqrt()).float(), (_root(ck, -0.5) @ vt.T * s.sqrt()).float())


def orthogonal(rank: int, bits: int, generator: torch.Generator) -> Tensor:
    """(rank, bits): columns of random orthogonal matrices, as many as needed."""
    blocks = [
        torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
        for _ in range(-(-bits // rank))
    ]
    return torch.cat(blocks, 1)[:, :bits]


def linear_stages(
    directions: Tensor,
    offset: Tensor,
    rotation: Tensor,
    shapes: Sequence[tuple],
    generator: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Stages of one head computing (x @ directions + offset) @ rotation.

    silu(u) - silu(-u) = u (relu and gelu likewise), so hidden units come in pairs u, -u.
    """
    if len(shapes) == 1:
        return [(directions @ rotation, offset @ rotation)]
    stages, rank = [], directions.shape[1]
    pair = torch.cat([torch.eye(rank), -torch.eye(rank)], 1)
    inner = [directions @ pair, *[pair.T @ pair] * (len(shapes) - 2), pair.T @ rotation]
    for stage, ((fan_in, fan_out), block) in enumerate(zip(shapes, inner, strict=True)):
        weight = torch.randn(fan_in, fan_out, generator=generator) * NOISE * fan_in**-0.5
        weight[: block.shape[0], : block.shape[1]] += block
        bias = torch.zeros(fan_out)
        if stage == 0:
            bias[: 2 * rank] = offset @ pair
        stages.append((weight, bias))
    return stages


def rank_of(config: HashConfig) -> int:
    """How many interaction directions maps of these shapes keep apart: `linear_stages` needs two
    hidden units for each."""
    room = config.head_dim if config.depth == 1 else config.hidden // 2
    return max(1, min(config.head_dim, room, config.bits))


def spectral_maps(
    queries: Tensor,
    keys: Tensor,
    query_stats: tuple[Tensor, Tensor],
    key_stats: tuple[Tensor, Tensor],
    config: HashConfig,
    generator: torch.Generator,
) -> LayerMaps:
    """Maps of normalised inputs that equal the sign of randomly rotated interaction directions.

    queries (Hq, r, D) and keys (Hkv, m, D) are samples, raw; the stats are their `moments`, mean
    and deviation (Hq, D) and (Hkv, D).
    """
    shapes = list(zip(config.widths, config.widths[1:], strict=False))
    # as many directions as bits: a square rotation keeps bits decorrelated, and the directions
    # left out are those that matter least (recall@4 0.61 against 0.52 with all 64, 32 bits)
    rank = rank_of(config)
    sides: dict[str, list] = {"key": [], "query": []}
    for kv_head in range(config.kv_heads):
        heads = range(kv_head * config.group, (kv_head + 1) * config.group)
        key = keys[kv_head].float()
        own = queries[list(heads)].flatten(0, 1).float()
        a, b = interaction_directions(second_moment(own), second_moment(key - key.mean(0)))
        copies = 1 if config.layout == "per_kv_head" else config.group
        rotations = [orthogonal(rank, config.bits, generator) for _ in range(copies)]
        for rotation in rotations:
            directions = key_stats[1][kv_head][:, None] * b[:, :rank]
            sides["key"].append(
                linear_stages(directions, torch.zeros(rank), rotation, shapes, generator)
            )
        for i, head in enumerate(heads):
            mean, std = query_stats[0][head], query_stats[1][head]
            sides["query"].append(
                linear_stages(
                    std[:, None] * a[:, :rank],
                    mean @ a[:, :rank],
                    rotations[i % copies],
                    shapes,
                    generator,
                )
            )
    maps = LayerMaps(*(stack_heads(sides[side], config) for side in ("key", "query")))
    q, k = _normalised(queries, query_stats), _normalised(keys, key_stats)
    return LayerMaps(
        _unit_outputs(maps.key, maps.preactivations_keys(k)),
        _unit_outputs(maps.query, maps.query(q)),
    )


def _normalised(x: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
    """x (heads, n, D) without its `moments`, float32."""
    return (x.float() - stats[0][:, None]) / stats[1][:, None]


def stack_heads(heads: list[list[tuple[Tensor, Tensor]]], config: HashConfig) -> HashMap:
    stages = zip(*heads, strict=True)
    weights, biases = zip(
        *[
            (torch.stack([w for w, _ in stage]), torch.stack([b for _, b in stage]))
            for stage in stages
        ],
        strict=True,
    )
    return HashMap(tuple(weights), tuple(biases), config.activation)


def _unit_outputs(part: HashMap, pre: Tensor) -> HashMap:
    """The map with its last stage scaled so that pre-activations, here `pre` (heads, n, bits), have
    size 1, where tanh is neither flat nor linear; the signs stay."""
    size = pre.square().mean((-2, -1)).sqrt()[:, None].clamp_min(1e-6)
    return replace(
        part,
        weights=(*part.weights[:-1], part.weights[-1] / size[..., None]),
        biases=(*part.biases[:-1], part.biases[-1] / size),
    )

"""Training of HATA's linear hash (Gong et al. 2025): a matrix per KV head for queries and keys.

Pairs of a sampled query and each of its causal keys are labelled by the rank of the key's score:
positive for the best share, -1 for the rest. The relaxed codes of positive pairs are drawn
together, those of negative ones pushed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.base.checks import is_count, require, require_numbers
from hashattn.base.engines.threads import thread_count
from hashattn.base.progress import progress_bar
from hashattn.hashing.capture import CapturedLayer

_NEGATIVE = -1.0  # label of a key outside the best share
COUNTS = {"steps": 0, "rows_per_step": 1}  # the least
POSITIVE = ("learning_rate", "sharpness", "best_label")
SHARES = ("best_share", "momentum", "decay")


@dataclass(frozen=True)
class HataRecipe:
    """How HATA's hash weights are trained; the defaults are the authors' code's.

    steps: optimiser steps a layer (15 epochs of 20). rows_per_step: queries a step, each from a
    random sequence and with all its causal keys, drawn anew (the authors draw one a sequence,
    once). best_share of the keys are labelled from best_label for the best down to 1 linearly, the
    others -1.

    The loss is similarity * mean over pairs of label * |h_q - h_k|^2, plus `balance` times the
    squared mean bit, plus `decorrelation` times |W'W - I|. They are named for what they weigh: the
    paper's eq. 8 calls the balance weight eta and the decorrelation weight lambda, while the code,
    whose run_training.sh has lambda 1 and eta 2, means the opposite by these letters. The values
    here are what the code does. With them decorrelation outweighs the labels on synthetic heads:
    recall ends where orthogonal weights drawn at random have it. sharpness: h(x) = 2
    sigmoid(sharpness x W) - 1.

    SGD with momentum and weight_decay; the learning rate is multiplied by `decay` each step (the
    authors' code sets that schedule up and never steps it: decay = 1 does the same).
    Raises ValueError naming the field, its value and what is allowed.
    """

    steps: int = 300
    rows_per_step: int = 8
    best_share: float = 0.1
    best_label: float = 20.0
    similarity: float = 0.01
    balance: float = 1.0
    decorrelation: float = 2.0
    sharpness: float = 0.1
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    decay: float = 0.998

    def __post_init__(self) -> None:
        require_numbers(vars(self), counts=COUNTS, shares=SHARES, positive=POSITIVE,
                        not_negative=vars(self))  # fmt: skip


@dataclass(frozen=True)
class LabelledQuery:
    """One position's queries (Hq, D), the keys (Hkv, m, D) that it sees and labels (Hq, m)."""

    queries: Tensor
    keys: Tensor
    labels: Tensor


def label_query(queries: Tensor, keys: Tensor, recipe: HataRecipe) -> LabelledQuery:
    """Labels of keys (Hkv, m, D) for queries (Hq, D) by the rank of q.k, at least one positive.

    Ties go to the earlier token.
    """
    kv_heads, m, dim = keys.shape
    queries, keys = queries.float(), keys.float()
    scores = (queries.view(kv_heads, -1, dim) @ keys.mT).flatten(0, 1)
    count = max(1, int(m * recipe.best_share))
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    falling = torch.linspace(recipe.best_label, 1.0, count, device=keys.device)
    labels = torch.full_like(scores, _NEGATIVE).scatter_(-1, best, falling.expand_as(best))
    return LabelledQuery(queries, keys, labels)


def hata_loss(weights: Tensor, examples: Sequence[LabelledQuery], recipe: HataRecipe) -> Tensor:
    """Loss of weights (Hkv, D, bits), a scalar summed over query heads; see HataRecipe.

    The pairs of all examples count alike. The mean bit of a query head is the sum of h_q + h_k over
    its pairs divided by pairs and bits, as in the authors' code.
    """
    bits = weights.shape[-1]
    pairs = sum(example.labels.shape[1] for example in examples)
    distance, total = weights.new_zeros(()), weights.new_zeros(())
    for example in examples:
        queries, keys = _relaxed(weights, example, recipe.sharpness)
        m = keys.shape[1]
        # |q - k|^2 = |q|^2 + |k|^2 - 2 q.k, so that no pair's difference is held
        gaps = (
            queries.square().sum(-1)[..., None]
            + keys.square().sum(-1)[:, None]
            - 2 * queries @ keys.mT
        )
        distance = distance + (example.labels.view_as(gaps) * gaps).sum()
        total = total + m * queries + keys.sum(dim=1, keepdim=True)
    balance = (total / (pairs * bits)).square().sum()
    identity = torch.eye(bits, device=weights.device)
    correlation = (weights.mT @ weights - identity).norm()
    return (
        recipe.similarity * distance / pairs
        + recipe.balance * balance
        + recipe.decorrelation * correlation
    )


def _relaxed(weights: Tensor, example: LabelledQuery, sharpness: float) -> tuple[Tensor, Tensor]:
    """h of an example's queries (Hkv, group, bits) and of its keys (Hkv, m, bits)."""
    queries = example.queries.view(weights.shape[0], -1, weights.shape[1])
    return tuple(2 * torch.sigmoid(sharpness * x @ weights) - 1 for x in (queries, example.keys))


def train_hata_weights(
    captured: Iterable[CapturedLayer],
    *,
    bits: int = 128,
    recipe: HataRecipe | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[int, Tensor]:
    """{layer: weights (Hkv, D, bits) float32}, every layer trained alone from N(0, 1) weights.

    captured: layers of one or more sequences, in any order. Queries are drawn from captured rows in
    the second half of their sequence where there are any, as the authors do. The operations are
    small, so that on a CPU one thread computes them. Raises ValueError when bits is no positive
    multiple of 32 or nothing was captured.
    """
    require(is_count(bits) and bits % 32 == 0, "bits", bits, "a positive multiple of 32")
    by_layer: dict[int, list[CapturedLayer]] = {}
    for capture in captured:
        if capture.positions.numel():
            by_layer.setdefault(capture.layer, []).append(capture)
    if not by_layer:
        raise ValueError("training got no captured rows; capture at least one sequence")
    recipe = recipe or HataRecipe()
    with thread_count(1):
        return {
            layer: _train_layer(by_layer[layer], bits, recipe, seed, progress)
            for layer in sorted(by_layer)
        }


def _train_layer(
    captures: Sequence[CapturedLayer], bits: int, recipe: HataRecipe, seed: int, progress: bool
) -> Tensor:
    layer, (kv_heads, _, dim) = captures[0].layer, captures[0].keys.shape
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    start = torch.randn(kv_heads, dim, bits, generator=generator)
    weights = start.to(captures[0].keys.device).requires_grad_()
    optimiser = torch.optim.SGD(
        [weights],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, recipe.decay)
    rows = [_later_rows(capture) for capture in captures]
    for _ in progress_bar(range(recipe.steps), desc=f"HATA layer {layer}", disable=not progress):
        examples = []
        for _ in range(recipe.rows_per_step):
            number = _draw(len(captures), generator)
            row = rows[number][_draw(len(rows[number]), generator)]
            examples.append(_example(captures[number], row, recipe))
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            hata_loss(weights, examples, recipe).backward()
        optimiser.step()
        schedule.step()
    return weights.detach()


def _later_rows(capture: CapturedLayer) -> list[int]:
    """Numbers of the captured rows in the second half of the sequence, of all if none is there."""
    later = capture.positions >= capture.keys.shape[1] // 2
    return (later if later.any() else ~later).nonzero().flatten().tolist()


def _example(capture: CapturedLayer, row: int, recipe: HataRecipe) -> LabelledQuery:
    seen = int(capture.positions[row]) + 1
    return label_query(capture.queries[:, row], capture.keys[:, :seen], recipe)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))

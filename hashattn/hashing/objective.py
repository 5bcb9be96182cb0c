"""The training objective: scores from soft or hard codes, and what a label costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.hashing.labels import RowLabels, attention_logits
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.slopes import FLOOR


@dataclass(frozen=True)
class Batch:
    """Rows of one sequence with the keys they are scored against.

    queries (Hq, r, D), keys (Hkv, n, D), allowed bool (r, n), visible (r,) tokens each row sees;
    labels whose tokens index `keys`; kept: share of the candidates that `keys` holds; scaling,
    softcap: of the model's logits.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor
    visible: Tensor
    labels: RowLabels
    kept: float = 1.0
    scaling: float = 1.0
    softcap: float | None = None


def relax(pre: Tensor, sharpness: float, hard: bool) -> Tensor:
    """Pre-activations (heads, n, bits) to bits in [-1, 1]: tanh(sharpness * pre), or if `hard` its
    sign with that tanh's gradient (straight-through)."""
    soft = torch.tanh(sharpness * pre)
    if not hard:
        return soft
    # what is added is 0 with tanh's gradient; taken first, so that the sum is exactly +-1
    return torch.where(pre > 0, 1.0, -1.0) + (soft - soft.detach())


def relaxed_scores(
    query_bits: Tensor, key_bits: Tensor, average: bool, group: str = "sum"
) -> Tensor:
    """Products of bits in [-1, 1], summed (or averaged) over bits and over a key map's queries.

    query_bits (Hq, r, bits), key_bits (maps, n, bits) to (maps, r, n), or (Hq, r, n) for group
    "each". The sum over the group is taken before the product: sum_g <q_g, k> = <sum_g q_g, k>.
    """
    maps, (heads, rows, bits) = key_bits.shape[0], query_bits.shape
    grouped = query_bits.view(maps, heads // maps, rows, bits)
    if group == "each":
        scores = (grouped @ key_bits[:, None].transpose(2, 3)).flatten(0, 1)
        return scores / bits if average else scores
    scores = grouped.sum(1) @ key_bits.transpose(1, 2)
    return scores * (maps / (heads * bits)) if average else scores


def label_weights(labels: RowLabels, mass_share: float) -> Tensor:
    """Weight of each label, (Hq, r, top): mass_share by the labels' own weights, the rest evenly.

    Both parts sum to the number of rows over a head, so mass_share is what it says; a row that
    attends only sink and local has little of the first part.
    """
    valid = labels.valid.float()
    weight = labels.weight.clamp_min(0)
    by_weight = weight * (weight.shape[1] / weight.sum((1, 2), keepdim=True).clamp_min(1e-6))
    evenly = valid / valid.sum(-1, keepdim=True).clamp_min(1)
    return mass_share * by_weight + (1 - mass_share) * evenly


def _by_map(x: Tensor, maps: int) -> Tensor:
    """(Hq, r, top) to (maps, r, group * top)."""
    heads, rows, top = x.shape
    return x.view(maps, heads // maps, rows, top).transpose(1, 2).reshape(maps, rows, -1)


def _ranking_loss(logits: Tensor, batch: Batch, recipe: TrainRecipe) -> Tensor:
    """The "cross_entropy" or "budgeted" loss (see TrainRecipe) of logits (maps or Hq, r, n), a
    scalar."""
    maps = logits.shape[0]
    weights = _by_map(label_weights(batch.labels, recipe.mass_share), maps)
    # not -inf: what stands for "no label" (token 0, in the sink) has weight 0, and 0 * inf is NaN
    masked = logits.masked_fill(~batch.allowed, torch.finfo(logits.dtype).min)
    total = masked.logsumexp(-1, keepdim=True)
    gap = total - masked.gather(-1, _by_map(batch.labels.tokens, maps))
    if recipe.loss == "budgeted":
        # k tokens of one score, all others far below, have a gap of log k: only more than that
        # costs. A sample of the keys holds that share of the k best
        k = (batch.kept * batch.visible / recipe.budget_fraction).clamp_min(1)
        gap = F.softplus(gap - k.log()[:, None])
    return (weights * gap).sum() / weights.sum().clamp_min(1e-6)


def _sampling_loss(logits: Tensor, batch: Batch, recipe: TrainRecipe) -> Tensor:
    """The "sampling" loss (see TrainRecipe) of logits (maps or Hq, r, n), a scalar."""
    # not -inf: a row without candidates has weight 0, and 0 does not silence NaN in a gradient
    barred, lowest = ~batch.allowed, torch.finfo(logits.dtype).min
    true = attention_logits(batch.queries, batch.keys, batch.scaling, batch.softcap)
    true = true.masked_fill_(barred, lowest).softmax(-1)
    # of a score for a group: it stands for the sum of its heads' weights
    true = true.unflatten(0, (len(logits), -1)).sum(1)
    estimated = logits.masked_fill(barred, lowest).softmax(-1)
    counts = batch.allowed.sum(-1)
    least = FLOOR / counts.clamp_min(1)[:, None]
    cost = (true.square() / (estimated + least)).sum(-1).log()
    mass = batch.labels.weight.clamp_min(0).sum(-1)  # rows that attend to candidates count
    weight = mass.unflatten(0, (len(logits), -1)).sum(1) * (counts > 0)
    return (weight * cost).sum() / weight.sum().clamp_min(1e-6)


def _bce_loss(logits: Tensor, batch: Batch, recipe: TrainRecipe) -> Tensor:
    """The paper's loss of logits (maps or Hq, r, n), a scalar: positives (label of any query head
    of the map) weigh alpha + beta * n, negatives 1; the mean counts non-candidates as zeros."""
    maps, rows, n = logits.shape
    tokens = _by_map(batch.labels.tokens, maps)
    valid = _by_map(batch.labels.valid.float(), maps)
    # amax: token 0 also stands for "no label", which must not erase a true label
    target = torch.zeros_like(logits).scatter_reduce(-1, tokens, valid, "amax")
    weight = recipe.alpha + recipe.beta * n
    # on logits, since the logarithm of a saturated sigmoid is -inf
    cost = F.softplus(logits) * (1 - target) + weight * F.softplus(-logits) * target
    return (cost * batch.allowed).sum() / (maps * rows * n)


def bit_penalties(key_bits: Tensor, recipe: TrainRecipe) -> Tensor:
    """balance * mean squared bit average + decorrelation * mean squared bit correlation of key_bits
    (maps, n, bits), a scalar."""
    bits = key_bits.shape[-1]
    penalty = recipe.balance * key_bits.mean(1).square().mean()
    if recipe.decorrelation:  # bits^2 products, which most recipes have no use for
        products = key_bits.transpose(1, 2) @ key_bits / key_bits.shape[1]
        off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        penalty = penalty + recipe.decorrelation * off.square().sum() / (len(off) * bits * bits)
    return penalty


def batch_loss(
    query_bits: Tensor,
    key_bits: Tensor,
    scale: Tensor,
    bias: Tensor,
    batch: Batch,
    recipe: TrainRecipe,
) -> Tensor:
    """Loss of relaxed codes query_bits (Hq, r, bits) and key_bits (maps, n, bits), a scalar; scale
    and bias (maps,) turn scores into logits."""
    scores = relaxed_scores(query_bits, key_bits, recipe.average_group, recipe.group)
    # with a score per query head, those that share a key map share its scale and bias as well
    scale, bias = (x.repeat_interleave(len(scores) // len(x))[:, None, None] for x in (scale, bias))
    logits = scores * scale + bias
    main = {"bce": _bce_loss, "sampling": _sampling_loss}.get(recipe.loss, _ranking_loss)
    return main(logits, batch, recipe) + bit_penalties(key_bits, recipe)

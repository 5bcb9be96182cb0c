"""The drift statistics themselves: of one sparse step, and of codes.

Each says one number of a query row: how well it was read (recall, missed mass), how clear the
choice was (margin), how usual the codes were (surprise).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hashattn.kernels import indices_to_mask
from hashattn.selectors.base import Selector
from hashattn.trust.exact import exact_logits, log_total

if TYPE_CHECKING:
    from hashattn.attention.observer import LayerStep

KEY_SURPRISE, QUERY_SURPRISE, MARGIN, RECALL, MISSED_MASS = STATISTICS = (
    "key_surprise",
    "query_surprise",
    "margin",
    "recall",
    "missed_mass",
)
_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_PRIOR = 32


@torch.no_grad()
def recall_and_missed_mass(step: LayerStep, top: int) -> tuple[Tensor, Tensor]:
    """Of a sparse step against exact attention over all its keys, each float32 (batch, q).

    recall: share of the `top` tokens of the largest logits, among those that are neither sink nor
    local, that were read; NaN where there is none. missed mass: softmax weight of the tokens that
    were not read, learned sinks counted in the sum. Means over query heads.
    """
    logits = exact_logits(step)
    heads, n = logits.shape[1], logits.shape[3]
    read = indices_to_mask(step.indices, n).repeat_interleave(heads // step.indices.shape[1], 1)
    candidates = step.plan.candidates.expand_as(logits)
    best = logits.masked_fill(~candidates, -torch.inf).topk(min(top, n), dim=-1).indices
    real = candidates.gather(-1, best)
    hits = read.gather(-1, best) & real
    recall = hits.sum(-1) / real.sum(-1)
    logits = logits.masked_fill(~step.plan.seen, -torch.inf)
    missed = ((logits - log_total(logits, step.logits["sinks"])).exp() * ~read).sum(-1)
    return recall.mean(1), missed.mean(1)


@torch.no_grad()
def margin_at_threshold(step: LayerStep, selector: Selector) -> Tensor | None:
    """How far the lowest selected score lies above the scores that were not selected: float32
    (batch, q), in their standard deviations from their mean; mean over token lists.

    Sink and local tokens do not count. None where scores do not decide what is read; NaN where
    nothing or everything was selected, or all other scores are equal.
    """
    if not selector.ranks or step.log_weights is not None:
        return None
    scores = selector.scores(step.layer, step.query, step.view, step.logits["scaling"]).float()
    read = indices_to_mask(step.indices, scores.shape[3])
    candidates = step.plan.candidates & scores.isfinite()
    lowest = scores.where(candidates & read, torch.inf).amin(-1)
    rest = candidates & ~read
    number = rest.sum(-1)
    mean = scores.where(rest, 0).sum(-1) / number
    spread = ((scores - mean[..., None]).where(rest, 0).square().sum(-1) / number).sqrt()
    margin = torch.where((spread > 0) & lowest.isfinite(), (lowest - mean) / spread, torch.nan)
    return margin.mean(1).float()


def surprise_tables(counts: np.ndarray) -> np.ndarray:
    """Bits of surprise of every byte of a code, float32 (heads, bytes, 256), from how often it
    occurred, counts of the same shape.

    Minus log2 of its estimated probability: the counts with a prior of 32 more that are spread as
    if the byte's bits were independent, each with its own rate (estimated as by Krichevsky and
    Trofimov 1981, so never 0 or 1).
    """
    total = counts.sum(-1, keepdims=True)
    rates = (counts @ _BYTE + 0.5) / (total + 1)  # (heads, bytes, 8)
    prior = np.exp(np.log(rates) @ _BYTE.T + np.log1p(-rates) @ (1 - _BYTE.T.astype(float)))
    return -np.log2((counts + _PRIOR * prior) / (total + _PRIOR)).astype(np.float32)


def bit_rates(tables: np.ndarray) -> np.ndarray:
    """How often each bit of a code is 1, (heads, bits), of surprise_tables."""
    return (np.exp2(-tables.astype(float)) @ _BYTE).reshape(len(tables), -1)


def count_bytes(codes: np.ndarray) -> np.ndarray:
    """How often each byte value occurs in codes uint8 (rows, heads, bytes): int64 (heads, bytes,
    256)."""
    rows, heads, places = codes.shape
    cells = (np.arange(heads * places) * 256).reshape(heads, places) + codes
    return np.bincount(cells.ravel(), minlength=heads * places * 256).reshape(heads, places, 256)


def surprise(codes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Bits of surprise of codes uint8 (rows, heads, bytes): float32 (rows,), mean over heads."""
    rows, heads, places = codes.shape
    cells = np.arange(0, heads * places * 256, 256) + codes.reshape(rows, -1)
    return tables.ravel()[cells].sum(1) / heads


def bits_of(codes: np.ndarray) -> np.ndarray:
    """Bits (rows, heads, bits), 0 or 1, of codes uint8 (rows, heads, bytes)."""
    return np.unpackbits(codes, axis=-1, bitorder="little")

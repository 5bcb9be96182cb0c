"""What a hash should find: the tokens that carry a query's attention, outside sink and local.

Positions are absolute and rows are causal: the query at position p sees tokens 0..p. The first
`sink` tokens and the last `local` ones (p's own included) are always attended, so candidates are
the tokens j with sink <= j <= p - local (HashAttention, selection and labels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLabels:
    """The heaviest candidates of each query row.

    tokens (query_heads, rows, top) int64, heaviest first, 0 where `weight` is -1 (fewer labels);
    weight (query_heads, rows, top): share of the row's whole softmax, or the output's loss.
    """

    tokens: Tensor
    weight: Tensor

    @property
    def valid(self) -> Tensor:
        """Which entries name a token, bool (query_heads, rows, top)."""
        return self.weight >= 0


def candidate_mask(positions: Tensor, n: int, sink: int, local: int) -> Tensor:
    """Tokens a selector may choose: positions (rows,) to bool (rows, n)."""
    tokens = torch.arange(n, device=positions.device)
    return (tokens >= sink) & (tokens <= positions[:, None] - local)


def attention_logits(
    queries: Tensor, keys: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """queries (Hq, r, D), keys (Hkv, n, D) to logits (Hq, r, n) float32, capped as Gemma 2's."""
    heads, rows, dim = queries.shape
    grouped = queries.float().reshape(keys.shape[0], -1, dim)
    logits = (grouped @ keys.float().transpose(1, 2) * scaling).view(heads, rows, -1)
    return capped(logits, softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits drawn into (-softcap, softcap) as Gemma 2's are; themselves for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def attention_mass(
    queries: Tensor, keys: Tensor, positions: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """Causal softmax of each row, (Hq, r, n) float32; zero for tokens after the row's position."""
    logits = attention_logits(queries, keys, scaling, softcap)
    future = torch.arange(keys.shape[1], device=keys.device) > positions[:, None]
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def _output_loss(mass: Tensor, values: Tensor) -> Tensor:
    """Relative change of each row's attention output when one token is left out, (Hq, r, n).

    mass (Hq, r, n) is the softmax a, values (Hkv, n, Dv); without token i the output o becomes
    (o - a_i v_i) / (1 - a_i), so the change is a_i / (1 - a_i) |v_i - o| / |o|.
    """
    values = values.float().repeat_interleave(mass.shape[0] // values.shape[0], 0)
    output = mass @ values
    distance = torch.cdist(output, values)
    size = output.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return mass / (1 - mass).clamp_min(1e-6) * distance / size


def row_labels(
    queries: Tensor,
    keys: Tensor,
    positions: Tensor,
    scaling: float,
    *,
    sink: int,
    local: int,
    top: int,
    top_fraction: float = 1.0,
    values: Tensor | None = None,
    softcap: float | None = None,
    rows_at_once: int = 64,
) -> RowLabels:
    """Labels of rows (Hq, r, D) against keys (Hkv, n, D), `rows_at_once` rows of scores at a time.

    The `top` heaviest candidates by attention mass, or with values (Hkv, n, Dv) by `_output_loss`;
    of n visible tokens at most n * top_fraction. Memory is Hq * rows_at_once * n floats, never a
    sequence's whole attention.
    """
    parts = []
    for start in range(0, positions.numel(), rows_at_once):
        rows = slice(start, start + rows_at_once)
        mass = attention_mass(queries[:, rows], keys, positions[rows], scaling, softcap)
        allowed = candidate_mask(positions[rows], keys.shape[1], sink, local)
        weight = mass if values is None else _output_loss(mass, values)
        best = weight.masked_fill(~allowed, -1.0).topk(min(top, keys.shape[1]), -1)
        most = ((positions[rows] + 1) * top_fraction).long().clamp_min(1)[:, None]
        place = torch.arange(best.values.shape[-1], device=keys.device)
        weights = best.values.masked_fill(place >= most, -1.0)
        parts.append((best.indices.masked_fill(weights < 0, 0), weights))
    return RowLabels(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

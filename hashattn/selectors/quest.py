"""Quest (Tang et al. 2024): rank pages of tokens by an upper bound of their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.base.checks import require, require_one_of
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.usual import MethodStyle

SCALE_BITS = 64  # a page's minimum and step, float32 each, when its bounds are quantised


@dataclass(frozen=True, eq=False)
class QuestSelector(Selector):
    """score(token) = sum_c max(q_c m_c, q_c M_c) over its page's channel bounds m <= k <= M.

    A page is `page` of a row's visible tokens, one after another. All tokens of a page score the
    same, so selection takes whole pages, best bound first, and cuts the last one at the budget.
    bits 16: bounds as computed; 2, 4 or 8: quantised per page with one minimum and step, rounded
    outwards, so that they stay bounds (the authors' benchmark quantises bounds adjusted by q, which
    cannot be stored). layout "per_query_head" (official) selects per query head, "per_kv_head" sums
    a group's bounds. A page's bounds cover all its cached keys; with local >= page - 1 no
    candidate's page holds a key later than the query.
    """

    name = "quest"
    style = MethodStyle("#009e73", "v", "Quest")

    page: int = 16
    bits: int = 16
    layout: Layout = "per_query_head"

    def __post_init__(self) -> None:
        require(self.page >= 1, "page", self.page, "at least 1 token")
        require_one_of("bits", self.bits, (2, 4, 8, 16))
        check_layout(self.layout)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Page bounds on q.k, float32 (B, lists, q, n); -inf where a row has no visible token."""
        return view.of_rows(
            lambda rows, tokens: self._of_pages(queries[rows], view.keys[rows][:, :, tokens])
        )

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """Two bounds a channel and page; below 16 bits also 64 for the page's minimum and step.

        Nothing is stored here: the bounds are computed from the cached keys at each step, since
        only the mask tells where a row's pages begin.
        """
        scales = 0 if self.bits == 16 else SCALE_BITS
        return (2 * head_dim * self.bits + scales) / self.page

    def _of_pages(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores (B, lists, q, n) of keys (B, KV heads, n, D), the first of which begins a page."""
        low, high = page_bounds(keys.float(), self.page)
        if self.bits < 16:
            low, high = quantise_bounds(low, high, self.bits)
        batch, heads, rows, dim = queries.shape
        kv_heads = low.shape[1]
        grouped = queries.float().reshape(batch, kv_heads, -1, dim)
        bound = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
        bound = bound.view(batch, heads, rows, -1)
        if self.layout == "per_kv_head":
            bound = bound.unflatten(1, (kv_heads, -1)).sum(dim=2)
        return bound.repeat_interleave(self.page, dim=-1)[..., : keys.shape[2]]


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Channel minima and maxima (B, H, pages, D) of keys (B, H, n, D); a last page may be short."""
    padding = -keys.shape[2] % page
    repeats = keys[:, :, -1:].expand(-1, -1, padding, -1)  # which change neither bound
    paged = torch.cat([keys, repeats], dim=2).unflatten(2, (-1, page))
    return paged.amin(dim=3), paged.amax(dim=3)


def quantise_bounds(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The bounds (B, H, pages, D) on a grid of 2**bits levels per page, low down and high up."""
    levels = 2**bits - 1
    base = low.amin(dim=-1, keepdim=True)
    step = ((high.amax(dim=-1, keepdim=True) - base) / levels).clamp(min=1e-20)
    down = ((low - base) / step).floor().clamp(0, levels)
    up = ((high - base) / step).ceil().clamp(0, levels)
    return base + step * down, base + step * up

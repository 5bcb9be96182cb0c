"""Quest (Tang et al. 2024): rank pages of tokens by an upper bound of their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.base.checks import require, require_one_of
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.calibration import CapturedRows, tensors_sha256
from hashattn.selectors.grids import fit_grid, grid_labels, grid_values
from hashattn.selectors.usual import MethodStyle

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice


@dataclass(frozen=True, eq=False)
class QuestSelector(Selector):
    """score(token) = sum_c max(q_c m_c, q_c M_c) over its page's channel bounds m <= k <= M.

    A page is `page` of a row's visible tokens, one after another. All tokens of a page score the
    same, so selection takes whole pages, best bound first, and cuts the last one at the budget.
    bits 16: bounds as computed; 2, 4 or 8: rounded to the nearest point of a grid per channel,
    grids {layer: (KV heads, 2, D)} from `calibrate`. Rounded outwards on one grid a page they would
    stay bounds, and select worse: the authors' benchmark rounds to the nearest as well.
    layout "per_query_head" (official) selects per query head, "per_kv_head" sums a group's bounds.
    A page's bounds cover all its cached keys; with local >= page - 1 no candidate's page holds a
    key later than the query.
    """

    name = "quest"
    style = MethodStyle("#009e73", "v", "Quest")

    page: int = 16
    bits: int = 16
    layout: Layout = "per_query_head"
    grids: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(self.page >= 1, "page", self.page, "at least 1 token")
        require_one_of("bits", self.bits, (2, 4, 8, 16))
        check_layout(self.layout)
        if self.bits < 16 and not self.grids:
            raise ValueError(
                f"bits = {self.bits}: bounds of fewer than 16 bits need the grids of "
                "QuestSelector.calibrate(captured, page=..., bits=...)"
            )
        self._settle(grids=dict(self.grids or {}))

    @classmethod
    def calibrate(
        cls,
        captured: Iterable[CapturedRows],
        page: int = 16,
        bits: int = 4,
        layout: Layout = "per_query_head",
    ) -> QuestSelector:
        """Grids for the bounds of pages of captured keys, per layer, KV head and channel; 16 bits
        need none.

        Raises ValueError when nothing was captured.
        """
        if bits == 16:
            return cls(page, bits, layout)
        bounds: dict[int, list[Tensor]] = {}
        for rows in captured:
            pages = torch.cat(page_bounds(rows.keys[None].float(), page), dim=2)[0]
            bounds.setdefault(rows.layer, []).append(pages)
        if not bounds:
            raise ValueError("calibration got no captured layers; capture at least one sequence")
        grids = {layer: fit_grid(torch.cat(parts, 1), bits) for layer, parts in bounds.items()}
        return cls(page, bits, layout, grids)

    @property
    def needs(self) -> str:
        """Calibration, where bounds are quantised."""
        return "calibration" if self.grids else "nothing"

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Page bounds on q.k, float32 (B, lists, q, n); -inf where a row has no visible token."""
        return view.of_rows(
            lambda rows, tokens: self._of_pages(layer, queries[rows], view.keys[rows][:, :, tokens])
        )

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """Two bounds a channel and page.

        Nothing is stored here: the bounds are computed from the cached keys at each step, since
        only the mask tells where a row's pages begin.
        """
        return 2 * head_dim * self.bits / self.page

    def weights_sha256(self) -> str | None:
        """Of the grids, None without them."""
        return tensors_sha256(self.grids) if self.grids else None

    def _shard(self, part: HeadSlice) -> QuestSelector:
        return self._with(grids=part.of_layers(self.grids))

    def _of_pages(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores (B, lists, q, n) of keys (B, KV heads, n, D), the first of which begins a page."""
        low, high = page_bounds(keys.float(), self.page)
        if self.bits < 16:
            low, high = (self._rounded(layer, bound) for bound in (low, high))
        batch, heads, rows, dim = queries.shape
        kv_heads = low.shape[1]
        grouped = queries.float().reshape(batch, kv_heads, -1, dim)
        bound = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
        bound = bound.view(batch, heads, rows, -1)
        if self.layout == "per_kv_head":
            bound = bound.unflatten(1, (kv_heads, -1)).sum(dim=2)
        return bound.repeat_interleave(self.page, dim=-1)[..., : keys.shape[2]]

    def _rounded(self, layer: int, bound: Tensor) -> Tensor:
        if layer not in self.grids:
            raise ValueError(
                f"layer {layer} has no calibrated grids, only {sorted(self.grids)}; "
                "calibrate on a capture of it, or make it a dense layer"
            )
        grid = self.grids[layer]
        return grid_values(grid_labels(bound, grid, self.bits), grid)


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Channel minima and maxima (B, H, pages, D) of keys (B, H, n, D); a last page may be short."""
    padding = -keys.shape[2] % page
    repeats = keys[:, :, -1:].expand(-1, -1, padding, -1)  # which change neither bound
    paged = torch.cat([keys, repeats], dim=2).unflatten(2, (-1, page))
    return paged.amin(dim=3), paged.amax(dim=3)

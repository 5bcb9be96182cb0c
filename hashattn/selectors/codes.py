"""Selectors that rank tokens by the Hamming distance of bit codes, learned or random."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hashattn.kernels import Codes, GrowableBuffer, hamming_scores, layout_for, select_by_codes
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.plan import SelectionPlan


@dataclass(frozen=True, eq=False)
class CodeSelector(Selector):
    """Ranks tokens by matching bits of codes, summed over the query heads that share a key's code.

    Subclasses encode: keys to {"codes": (batch, code heads, n, words) int32}, queries to codes of
    the same bits, plain or graded. Codes are stored as the device's kernels read them, and tokens
    are selected from them without scores.
    by_codes: False where scores are more than matching bits, so that tokens are selected by scores.
    """

    by_codes: ClassVar[bool] = True
    most: ClassVar[int | None] = None  # what the weights of graded queries sum to

    @abstractmethod
    def encode_queries(self, layer: int, queries: Tensor, view: KeyView) -> Tensor:
        """Codes (batch, query heads, q, words) int32 of queries (batch, query heads, q, D), or
        graded ones (batch, lists, q, words, 1 + planes)."""

    def new_store(self, name: str, part: Tensor) -> GrowableBuffer | Codes:
        """Codes in the layout of their device; any other part (batch, heads, n, ...) as it is."""
        return layout_for(part.device)() if name == "codes" else super().new_store(name, part)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Matching bits, int32 (batch, lists, q, n)."""
        lists = self.lists(queries.shape[1], view.keys.shape[1])
        return hamming_scores(self.encode_queries(layer, queries, view), view.index["codes"], lists)

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (batch, lists, q, m) int32, -1 padded: straight from the codes, where they decide
        and every row sees one interval of tokens."""
        if plan.spans is None or not self.by_codes:
            return super().select(layer, queries, view, scaling, plan)
        return select_by_codes(
            self.encode_queries(layer, queries, view),
            view.index["codes"],
            plan.heavy,
            plan.sink,
            plan.local,
            spans=plan.spans,
            lists=self.lists(queries.shape[1], view.keys.shape[1]),
            width=plan.width,
            most=self.most,
        )

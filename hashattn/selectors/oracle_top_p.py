"""Oracle top-p: as many tokens as an attention mass needs, ranked by exact attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.kernels import mask_to_indices
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.logits import inner_products, scores_by_layout
from hashattn.selectors.plan import SelectionPlan
from hashattn.selectors.usual import MethodStyle


@dataclass(frozen=True, eq=False)
class OracleTopPSelector(Selector):
    """The fewest tokens whose exact attention, with sink and local, reaches p of the whole.

    Nucleus selection (Twilight, Lin et al. 2025, does it among a cheaper selector's tokens): rows
    that look at few tokens read few. SelectionPlan.heavy is a cap here and not a count; where it
    binds, the mass falls short of p. layout "per_query_head": p of each query head; "per_kv_head":
    p of the mean over a group's query heads. ValueError for a p outside (0, 1) or an unknown
    layout.
    """

    name = "oracle_top_p"
    style = MethodStyle("#bbbbbb", (4, 1, 0), "oracle top-p")
    ranks = False

    p: float = 0.95
    layout: Layout = "per_query_head"

    def __post_init__(self) -> None:
        require(0 < self.p < 1, "p", self.p, "between 0 and 1")
        check_layout(self.layout)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """As the oracle's: exact logits, or a group's weights, float32 (B, lists, q, n)."""
        logits = inner_products(queries, view.keys) * scaling
        return scores_by_layout(logits, self.layout, view)

    def read_bits(self, group: int, head_dim: int) -> float:
        """All of K, at 16 bits a channel."""
        return 16.0 * head_dim

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (B, lists, q, m) int32: mandatory tokens, and the best candidates up to mass p or
        plan.heavy."""
        mass = self._mass(self.scores(layer, queries, view, scaling), plan.seen)
        fixed = (mass * plan.mandatory).sum(dim=-1, keepdim=True)
        best = mass.masked_fill(~plan.candidates, -1).sort(dim=-1, descending=True, stable=True)
        gain = best.values.clamp(min=0)
        before = fixed + pad(gain.cumsum(dim=-1)[..., :-1], (1, 0))  # mass read before each token
        place = torch.arange(plan.n, device=mass.device)
        needed = (before < self.p) & (place < plan.heavy[..., None])
        heavy = torch.zeros_like(needed).scatter_(-1, best.indices, needed) & plan.candidates
        return mask_to_indices(heavy | plan.mandatory)

    def _mass(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Share of each list's attention, float64 (B, lists, q, n), 0 for tokens not `seen`."""
        scores = scores.double()
        if self.layout == "per_query_head":
            # the lowest finite value, not -inf: a row of padding would become NaN
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)
        scores = scores * seen
        return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

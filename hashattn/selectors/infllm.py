"""InfLLM (Xiao et al. 2024): rank blocks of tokens by a few representative tokens of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from hashattn.base.checks import require
from hashattn.base.errors import UnsupportedModelError
from hashattn.selectors.base import KeyView
from hashattn.selectors.observed import ObservingSelector, attention_by_rows
from hashattn.selectors.usual import MethodStyle

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

KEY_BITS = 16


@dataclass(frozen=True, eq=False)
class InfLLMSelector(ObservingSelector):
    """score(token) = sum of q.k over the representatives k of its block, all rows and query heads.

    A block is `block` of a row's visible tokens, one after another. Representatives are, per KV
    head, the `representatives` tokens of a block that gathered the most attention, group means,
    from the queries whose local window of `window` tokens held them (the paper writes their mean
    q.k, its code sums the softmax over the window, as here); ties go to the first. All tokens of a
    block score the same, so selection takes whole blocks, the same for all heads of a layer and all
    rows of a call, and cuts the last one at the budget. Keys carry the positions they were cached
    with, where InfLLM looks blocks up without any.
    """

    name = "infllm"
    style = MethodStyle("#332288", "p", "InfLLM")

    block: int = 128
    representatives: int = 4
    window: int = 4096

    def __post_init__(self) -> None:
        block, count = self.block, self.representatives
        require(block >= 1, "block", block, "at least 1 token")
        require(1 <= count <= block, "representatives", count, f"within 1..{block}")
        require(self.window >= 1, "window", self.window, "at least 1 token")

    def observe(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, read: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{"gathered": (B, KV heads, n) float32}: attention within the local window so far."""
        weights = attention_by_rows(queries, view, scaling, window=self.window)
        return {"gathered": self.gathered(view, weights)}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Block scores, (B, KV heads, q, n) float32; -inf where a row has no visible token."""
        gathered = self.remembered(view, "gathered", 0.0)
        summed = self._summed(queries, view)
        scores = view.of_rows(
            lambda rows, tokens: self._of_blocks(
                summed[rows], view.keys[rows][:, :, tokens], gathered[rows][:, :, tokens]
            )
        )
        return scores.expand(-1, view.keys.shape[1], queries.shape[2], -1)

    def _shard(self, part: HeadSlice) -> InfLLMSelector:
        raise UnsupportedModelError(
            "infllm ranks a block by all heads of a layer, and tensor parallelism spreads them "
            'over processes: load the model on one device or with device_map="auto"'
        )

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """The float32 attention gathered; representatives' keys are read from the cache."""
        return 32.0

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """The representatives' keys, 16 bits a channel. The attention gathered is left out: a
        token's is needed only until its local window and its block are full."""
        return self.representatives * head_dim * KEY_BITS / self.block

    def _summed(self, queries: Tensor, view: KeyView) -> Tensor:
        """Queries (B, KV heads, D), summed over the group and over all rows but padding."""
        real = view.real_queries(queries.shape[2])
        total = (queries.float() * real[:, None, :, None]).sum(dim=2)
        return total.unflatten(1, (view.keys.shape[1], -1)).sum(dim=2)

    def _of_blocks(self, queries: Tensor, keys: Tensor, gathered: Tensor) -> Tensor:
        """Scores (B, 1, 1, n) of keys (B, KV heads, n, D), the first of which begins a block, by
        summed queries (B, KV heads, D) and the attention gathered (B, KV heads, n)."""
        n = keys.shape[2]
        padding = -n % self.block
        blocks = pad(gathered, (0, padding), value=-1.0).unflatten(2, (-1, self.block))
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        # a short last block may have representatives in the padding: their keys are zero
        keys = pad(keys.float(), (0, 0, 0, padding)).unflatten(2, (-1, self.block))
        best = order[..., : self.representatives, None].expand(*[-1] * 4, keys.shape[-1])
        summed_keys = keys.gather(3, best).sum(dim=3)
        score = (summed_keys @ queries[..., None])[..., 0].sum(dim=1)
        return score.repeat_interleave(self.block, dim=-1)[:, None, None, :n]

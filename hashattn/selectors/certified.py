"""Any method's tokens, and as many more as a bound on what is missed asks for.

A quantised copy of the keys has a known error: with k' the copy and e = |k - k'|, Cauchy-Schwarz
puts q.k between q.k' - |q| e and q.k' + |q| e. So what attention unread tokens can have at most,
and read ones have at least, is known without reading a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.base.checks import is_number, require
from hashattn.kernels import indices_to_mask, mask_to_indices
from hashattn.selectors.base import IndexStore, KeyView, Selector
from hashattn.selectors.plan import SelectionPlan
from hashattn.selectors.usual import MethodStyle, UsualContext
from hashattn.selectors.wrapper import WrapperSelector

_CODES, _SCALES = "certificate_codes", "certificate_scales"
_SCALE_BITS = 64  # a key's scale and error, float32
_ROUNDING = 1e-5  # what float32 may lose of a product of two vectors, of their norms


@dataclass(frozen=True, eq=False)
class CertifiedSelector(WrapperSelector):
    """What `base` reads, and more where that may miss more than `tolerance` of the attention.

    Beside the base's data it keeps a copy of the keys in `bits` (8 or 4) a channel, with the norm
    of what each copy lacks. Where the bound of the mass that a query head misses (`missed_at_most`)
    is above the tolerance, its list takes the tokens with the largest upper bounds until it is not:
    no needle stays unread, whatever the codes say. That holds for every head and row, certainly and
    not on average, for attention over these queries and keys; what earlier sparse layers changed in
    them is not covered. The budget is then what is read at least. It looks at all copies in each
    step, which is as slow as dense attention where these lie in the same memory as the keys: it
    pays where keys and values do not (`Memory`), and as a measurement. softcap: the model's logit
    cap (Gemma 2), None without one. ValueError for other bits or a tolerance outside (0, 1).
    """

    name = "certified"
    style = MethodStyle("#004d40", (4, 1, 45), "HashAttention, certified")

    bits: int = 8
    tolerance: float = 0.1
    softcap: float | None = None

    def __post_init__(self) -> None:
        require(self.bits in (8, 4), "bits", self.bits, "8 or 4")
        valid = is_number(self.tolerance) and 0 < self.tolerance < 1
        require(valid, "tolerance", self.tolerance, "a share of the attention between 0 and 1")
        valid = self.softcap is None or (is_number(self.softcap) and self.softcap > 0)
        require(valid, "softcap", self.softcap, "a positive number, or None")
        super().__post_init__()
        self._settle(evicts=False)  # what the base would drop, the copy brings back

    @classmethod
    def usual(cls, context: UsualContext) -> CertifiedSelector:
        """Of the hash selector, for a tenth of the attention."""
        from hashattn.selectors.hash import HashSelector  # only the usual base needs it

        return cls(HashSelector.usual(context))

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """The base's, and of keys (B, KV heads, n, D) codes (B, KV heads, n, D or D / 2) uint8 with
        scales and errors (B, KV heads, n, 2) float32."""
        exact, most = keys.float(), 2 ** (self.bits - 1) - 1
        scale = exact.abs().amax(dim=-1, keepdim=True) / most
        codes = (exact / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round().to(torch.int8)
        error = (exact - codes * scale).norm(dim=-1, keepdim=True)
        error = error + _ROUNDING * exact.norm(dim=-1, keepdim=True)
        packed = codes.view(torch.uint8) if self.bits == 8 else _packed(codes)
        own = {_CODES: packed, _SCALES: torch.cat((scale, error), dim=-1)}
        return self.base.encode_keys(layer, keys) | own

    def new_store(self, name: str, part: Tensor) -> IndexStore:
        """The base's for its part; buffers that grow for the copy."""
        own = name in (_CODES, _SCALES)
        return Selector.new_store(self, name, part) if own else self.base.new_store(name, part)

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """As the base, and the copy with its scales and errors."""
        return super().auxiliary_bits(group, head_dim) + self._copy_bits(head_dim)

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """As the base, and the copy with its scales and errors."""
        return super().nominal_bits(group, head_dim) + self._copy_bits(head_dim)

    def read_bits(self, group: int, head_dim: int) -> float:
        """As the base, and the whole copy."""
        return super().read_bits(group, head_dim) + self._copy_bits(head_dim)

    def _copy_bits(self, head_dim: int) -> float:
        return self.bits * head_dim + _SCALE_BITS

    def select(
        self, layer: int, queries: Tensor, view: KeyView, scaling: float, plan: SelectionPlan
    ) -> Tensor:
        """Indices (B, lists, q, m) int32, -1 padded: the base's, and those that the tolerance needs
        of every query head of the list."""
        chosen = self.base.select(layer, queries, view, scaling, plan)
        read = _read_by_heads(chosen, plan.n, queries.shape[1])
        least, most = self._bounds(queries, view, scaling, plan.seen)
        lacking = self._missed(least, most, read) > self.tolerance  # (B, heads, q)
        if not lacking.any():
            return chosen
        read[lacking] |= self._needed(least[lacking], most[lacking], read[lacking])
        return mask_to_indices(read.unflatten(1, (chosen.shape[1], -1)).any(dim=2))

    def missed_at_most(
        self, queries: Tensor, view: KeyView, scaling: float, indices: Tensor, seen: Tensor
    ) -> Tensor:
        """Upper bounds (B, heads, q) of the share of the attention of queries (B, heads, q, D) that
        falls on `seen` tokens (B or 1, 1, q, n) outside of the lists (B, lists, q, m).

        Of a step that an observer sees: `step.query`, `step.view`, `step.logits["scaling"]`,
        `step.indices` and `step.plan.seen`.
        """
        read = _read_by_heads(indices, seen.shape[-1], queries.shape[1])
        return self._missed(*self._bounds(queries, view, scaling, seen), read)

    def _bounds(
        self, queries: Tensor, view: KeyView, scaling: float, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Between which weights exp(logit) lie, (B, heads, q, n) float64, up to a factor of the
        row; 0 for tokens that it does not see."""
        codes, scales = view.index[_CODES], view.index[_SCALES]
        codes = codes.view(torch.int8) if self.bits == 8 else _unpacked(codes)
        batch, kv_heads = codes.shape[:2]
        grouped = queries.float().unflatten(1, (kv_heads, -1))  # (B, KV heads, group, q, D)
        scale, error = scales.unsqueeze(2).unsqueeze(3).unbind(dim=-1)
        copies = (grouped @ codes.float().unsqueeze(2).mT) * scale * scaling
        slack = grouped.norm(dim=-1, keepdim=True) * error * abs(scaling)
        bounds = [(copies + sign * slack).double().flatten(1, 2) for sign in (-1, 1)]
        if self.softcap is not None:  # it grows with the logit, so bounds stay bounds
            bounds = [torch.tanh(bound / self.softcap) * self.softcap for bound in bounds]
        bounds = [bound.masked_fill(~seen, -torch.inf) for bound in bounds]
        top = bounds[1].amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        return tuple((bound - top).exp() for bound in bounds)

    @staticmethod
    def _missed(least: Tensor, most: Tensor, read: Tensor) -> Tensor:
        """The most that tokens which are not read can have of the attention; 0 where no token is
        seen."""
        outside = most.masked_fill(read, 0).sum(dim=-1)
        return (outside / (outside + least.masked_fill(~read, 0).sum(dim=-1))).nan_to_num(0)

    def _needed(self, least: Tensor, most: Tensor, read: Tensor) -> Tensor:
        """The fewest tokens, largest upper bounds first, whose reading meets the tolerance: bool
        (rows, n), of rows that read too little."""
        outside = most.masked_fill(read, 0)
        ranked, order = outside.sort(dim=-1, descending=True)
        gained = least.masked_fill(read, 0).gather(-1, order).cumsum(dim=-1)
        inside = least.masked_fill(~read, 0).sum(dim=-1, keepdim=True) + gained
        left = ranked.flip(-1).cumsum(dim=-1).flip(-1) - ranked  # beyond each token
        missed = left / (left + inside)
        count = (missed > self.tolerance).sum(dim=-1, keepdim=True) + 1
        wanted = torch.arange(most.shape[-1], device=most.device) < count
        return torch.zeros_like(read).scatter_(-1, order, wanted & (ranked > 0))


def _read_by_heads(indices: Tensor, n: int, heads: int) -> Tensor:
    """Which of n tokens each query head reads, bool (B, heads, q, n), of lists (B, lists, q, m)."""
    lists = indices_to_mask(indices, n)
    return lists.repeat_interleave(heads // lists.shape[1], dim=1)


def _packed(codes: Tensor) -> Tensor:
    """Codes of -7..7 (..., D) int8 in halves of bytes (..., D / 2), the second half of the channels
    in the high ones."""
    low, high = (codes + 8).view(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of `_packed`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8

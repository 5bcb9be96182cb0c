"""HashAttention: learned codes of keys and queries, ranked by Hamming distance (section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashattn.hashing.weights import HashWeights
from hashattn.kernels import tokens_of, unpack_bits
from hashattn.selectors.base import KeyView
from hashattn.selectors.codes import CodeSelector

SCORINGS = ("hamming", "asymmetric")
TOKENS_AT_ONCE = 1024  # activations of a long prefill stay in the processor's cache (1.7x on a CPU)


class HashSelector(CodeSelector):
    """Ranks tokens by matching bits between learned codes of the query and of the keys.

    The weights' layout decides the rest: "per_query_head" (the official one) stores a code per
    query head and selects per query head; "per_kv_head" stores a code per KV head, sums the matches
    over the group and selects once per group.

    scoring "hamming" compares bits with bits. "asymmetric" compares them with the query map's
    pre-activations p: score = sum over bits of p b, b = 1 or -1, again summed over the group. It
    keeps how sure the query is of each bit, stores nothing more, and runs in plain torch.
    """

    name = "hash"
    sparse = True
    needs = "training"

    def __init__(self, weights: HashWeights, scoring: str = "hamming") -> None:
        if scoring not in SCORINGS:
            raise ValueError(f"scoring = {scoring!r} must be one of {list(SCORINGS)}")
        self.weights, self.scoring, self.by_codes = weights, scoring, scoring == "hamming"
        self.trained = weights.trained
        self.layout = "query_head" if self._per_query_head else "kv_head"

    @property
    def _per_query_head(self) -> bool:
        return self.weights.config.layout == "per_query_head"

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"codes": int32 (B, KV heads or query heads, n, words)} of keys (B, KV heads, n, D)."""
        parts = keys.split(TOKENS_AT_ONCE, dim=2)
        return {"codes": torch.cat([self.weights.encode_keys(layer, p) for p in parts], dim=2)}

    def encode_step(
        self, layer: int, keys: Tensor, queries: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Codes of new keys and of the queries that come with them, in one pass over the maps."""
        if not self.by_codes:
            return self.encode_keys(layer, keys), None
        query_codes, key_codes = self.weights.encode_step(layer, queries, keys)
        return {"codes": key_codes}, query_codes

    def encode_queries(self, layer: int, queries: Tensor, view: KeyView | None = None) -> Tensor:
        """Codes int32 (B, query heads, q, words) of queries (B, query heads, q, D)."""
        return self.weights.encode_queries(layer, queries)

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Matching bits, int32 (B, lists, q, n), or the asymmetric score, float32."""
        if self.by_codes:
            return super().scores(layer, queries, view, scaling)
        real = self.weights.preactivations_queries(layer, queries)
        codes = tokens_of(view.index["codes"])
        batch, heads, rows, bits = real.shape
        signs = unpack_bits(codes, bits).float() * 2 - 1
        grouped = real.reshape(batch, codes.shape[1], -1, rows, bits).sum(dim=2)
        return grouped @ signs.mT

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """bits per KV head, times the group when every query head has its own code."""
        bits = self.weights.config.bits
        return float(bits * group if self._per_query_head else bits)

    def record(self) -> dict[str, Any]:
        """Method, layout, bits and the hash weights' content hash."""
        config = self.weights.config
        return {
            "name": self.name,
            "parameters": {
                "layout": config.layout,
                "bits": config.bits,
                "depth": config.depth,
                "scoring": self.scoring,
            },
            "weights_sha256": self.weights.sha256,
        }

"""Loki (Singhania et al. 2024): rank tokens in the leading principal components of the keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require, require_one_of
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.calibration import CapturedRows, covariance_by_layer, tensors_sha256
from hashattn.selectors.grids import fit_grid, grid_labels, grid_values
from hashattn.selectors.logits import inner_products, scores_by_layout
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

_COMPONENT_BITS = (2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class LokiSelector(Selector):
    """logit(token) = (P^T q).(P^T k), P the first principal components of calibration keys.

    basis {layer: (KV heads, D, components)}: orthonormal columns per KV head, from keys after the
    rotary embedding (the paper also tries them before it). As in the paper, P is of centred keys
    but projects q and k as they are: rotating both does not change q.k, of which the leading
    components are kept. The paper stores K itself in the full rotated basis and needs nothing
    extra; here K stays as the model made it, with its components beside it: in float16, or with
    bits 2, 4 or 8 as labels of a grid per component, grids {layer: (KV heads, 2, components)} from
    `calibrate`.
    layout "per_query_head" (official) selects per query head; "per_kv_head" once per group, by the
    sum of its softmax weights of these logits.
    """

    name = "loki"
    style = MethodStyle("#117733", (6, 1, 0), "Loki")
    needs = "calibration"

    basis: Mapping[int, Tensor] = field(repr=False)
    layout: Layout = "per_query_head"
    bits: int = 16
    grids: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_layout(self.layout)
        require_one_of("bits", self.bits, _COMPONENT_BITS)
        if self.bits < 16 and not self.grids:
            raise ValueError(
                f"bits = {self.bits}: components of fewer than 16 bits need the grids of "
                "LokiSelector.calibrate(captured, components, bits=...)"
            )
        widths = {tensor.shape[-1] for tensor in self.basis.values()}
        if len(widths) != 1:
            raise ValueError(
                "basis needs at least one layer, and the same number of components in each, not "
                f"{sorted(widths)}"
            )
        self._settle(basis=dict(self.basis), grids=dict(self.grids or {}))

    @classmethod
    def usual(cls, context: UsualContext) -> LokiSelector:
        """32 components per query head, calibrated on the comparison's captures."""
        return cls.calibrate(context.calibrated)

    @property
    def components(self) -> int:
        """Components of a key, the same in every layer."""
        return next(iter(self.basis.values())).shape[-1]

    @classmethod
    def calibrate(
        cls,
        captured: Iterable[CapturedRows],
        components: int = 32,
        layout: Layout = "per_query_head",
        bits: int = 16,
    ) -> LokiSelector:
        """The `components` leading eigenvectors of the captured keys' covariance, per KV head; and
        grids for the keys' components, where these have fewer than 16 bits.

        Raises ValueError when nothing was captured, or fewer channels than components.
        """
        captured = list(captured)
        covariances = covariance_by_layer(captured, lambda c: c.keys)
        basis = {layer: _leading(matrix, components) for layer, matrix in covariances.items()}
        if bits == 16:
            return cls(basis, layout)
        parts: dict[int, list[Tensor]] = {}
        for rows in captured:
            parts.setdefault(rows.layer, []).append(rows.keys.float() @ basis[rows.layer])
        grids = {layer: fit_grid(torch.cat(seen, 1), bits) for layer, seen in parts.items()}
        return cls(basis, layout, bits, grids)

    @property
    def sums_weights(self) -> bool:
        """Where a group shares a list."""
        return self.layout == "per_kv_head"

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"components": float16, or uint8 labels, (B, KV heads, n, components)} of keys (B, KV
        heads, n, D)."""
        components = self._project(layer, keys)
        if self.bits == 16:
            return {"components": components.half()}
        return {"components": grid_labels(components, self.grids[layer], self.bits)}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Approximate logits, or a group's weights, float32 (B, lists, q, n)."""
        projected = self._project(layer, queries)
        components = view.index["components"]
        if self.bits < 16:
            components = grid_values(components, self.grids[layer])
        logits = inner_products(projected, components) * scaling
        return scores_by_layout(logits, self.layout, view)

    def _shard(self, part: HeadSlice) -> LokiSelector:
        return self._with(basis=part.of_layers(self.basis), grids=part.of_layers(self.grids))

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """`nominal_bits` with labels in whole bytes."""
        return float(max(8, self.bits) * self.components)

    def nominal_bits(self, group: int, head_dim: int) -> float:
        """bits a component; the paper's own layout, K stored rotated, has none."""
        return float(self.bits * self.components)

    def parameters(self) -> dict[str, Any]:
        """The number of components, the layout, and a component's bits where it is quantised."""
        settings = {"components": self.components} | super().parameters()
        return {k: v for k, v in settings.items() if k != "bits" or self.bits < 16}

    def weights_sha256(self) -> str:
        """Of the bases, and of grids if there are any."""
        grids = {-1 - layer: grid for layer, grid in self.grids.items()}
        return tensors_sha256(dict(self.basis) | grids)

    def _project(self, layer: int, x: Tensor) -> Tensor:
        """x (B, H, n, D) in its KV head's basis: float32 (B, H, n, components)."""
        if layer not in self.basis:
            raise ValueError(
                f"layer {layer} has no calibrated basis, only {sorted(self.basis)}; "
                "calibrate on a capture of it, or make it a dense layer"
            )
        basis = self.basis[layer].to(x.device, torch.float32)
        return x.float() @ basis.repeat_interleave(x.shape[1] // basis.shape[0], dim=0)


def _leading(covariance: Tensor, components: int) -> Tensor:
    """Eigenvectors (H, D, components) float32 of covariance (H, D, D), largest variance first."""
    dim = covariance.shape[-1]
    require(0 < components <= dim, "components", components, f"within 1..{dim}")
    vectors = torch.linalg.eigh(covariance).eigenvectors  # of ascending eigenvalues
    return vectors.flip(-1)[..., :components].float().contiguous()

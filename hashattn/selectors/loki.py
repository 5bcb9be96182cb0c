"""Loki (Singhania et al. 2024): rank tokens in the leading principal components of the keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import require
from hashattn.base.layout import Layout, check_layout
from hashattn.selectors.base import KeyView, Selector
from hashattn.selectors.calibration import CapturedRows, covariance_by_layer, tensors_sha256
from hashattn.selectors.logits import inner_products, scores_by_layout
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.models.heads import HeadSlice

_COMPONENT_BITS = 16  # components are stored as float16


@dataclass(frozen=True, eq=False)
class LokiSelector(Selector):
    """logit(token) = (P^T q).(P^T k), P the first principal components of calibration keys.

    basis {layer: (KV heads, D, components)}: orthonormal columns per KV head, from keys after the
    rotary embedding (the paper also tries them before it). As in the paper, P is of centred keys
    but projects q and k as they are: rotating both does not change q.k, of which the leading
    components are kept. The paper stores K itself in the full rotated basis and needs nothing
    extra; here K stays as the model made it, with its components beside it in float16.
    layout "per_query_head" (official) selects per query head; "per_kv_head" once per group, by the
    sum of its softmax weights of these logits.
    """

    name = "loki"
    style = MethodStyle("#117733", (6, 1, 0), "Loki")
    needs = "calibration"

    basis: Mapping[int, Tensor] = field(repr=False)
    layout: Layout = "per_query_head"

    def __post_init__(self) -> None:
        check_layout(self.layout)
        widths = {tensor.shape[-1] for tensor in self.basis.values()}
        if len(widths) != 1:
            raise ValueError(
                "basis needs at least one layer, and the same number of components in each, not "
                f"{sorted(widths)}"
            )
        self._settle(basis=dict(self.basis))

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
    ) -> LokiSelector:
        """The `components` leading eigenvectors of the captured keys' covariance, per KV head.

        Raises ValueError when nothing was captured, or fewer channels than components.
        """
        covariances = covariance_by_layer(captured, lambda c: c.keys)
        basis = {layer: _leading(matrix, components) for layer, matrix in covariances.items()}
        return cls(basis, layout)

    def encode_keys(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """{"components": float16 (B, KV heads, n, components)} of keys (B, KV heads, n, D)."""
        return {"components": self._project(layer, keys).half()}

    def scores(self, layer: int, queries: Tensor, view: KeyView, scaling: float) -> Tensor:
        """Approximate logits, or a group's weights, float32 (B, lists, q, n)."""
        projected = self._project(layer, queries)
        logits = inner_products(projected, view.index["components"]) * scaling
        return scores_by_layout(logits, self.layout, view)

    def _shard(self, part: HeadSlice) -> LokiSelector:
        return self._with(basis=part.of_layers(self.basis))

    def auxiliary_bits(self, group: int, head_dim: int) -> float:
        """16 bits a component; the paper's own layout, K stored rotated, has none."""
        return float(_COMPONENT_BITS * self.components)

    def parameters(self) -> dict[str, Any]:
        """The number of components, and the layout."""
        return {"components": self.components} | super().parameters()

    def weights_sha256(self) -> str:
        """Of the bases."""
        return tensors_sha256(self.basis)

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

"""Transform codes as a method: calibrated in seconds, no gradients (hashing.transform)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hashattn.hashing.transform import calibrate_transform
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.usual import MethodStyle, UsualContext

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer


@dataclass(frozen=True, eq=False)
class TransformSelector(HashSelector):
    """Ranks tokens by q.k with the key as its code remembers it: along the directions in which
    queries and keys interact, quantised to as many bits each as it deserves.

    weights: hash weights with folds, calibrated (`calibrate`) or trained on from there. Saved and
    loaded as all hash weights are.
    """

    name = "transform"
    style = MethodStyle("#0a9396", (4, 0, 0), "transform code")
    needs = "calibration"

    @classmethod
    def calibrate(
        cls, captured: Iterable[CapturedLayer], bits: int = 64, folds: int = 3
    ) -> TransformSelector:
        """Of the captured layers of some sequences; see hashing.calibrate_transform."""
        return cls(calibrate_transform(captured, bits=bits, folds=folds))

    @classmethod
    def usual(cls, context: UsualContext) -> TransformSelector:
        """As many bits as the comparison's hashes, calibrated on its captures."""
        return cls.calibrate(context.calibrated, context.weights.config.bits)

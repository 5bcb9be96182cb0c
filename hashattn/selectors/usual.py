"""What comparisons need of a method: what its usual setting is made from, its look in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hashattn.hashing.capture import CapturedLayer
    from hashattn.hashing.weights import HashWeights


class MethodStyle(NamedTuple):
    """How a method is drawn: colour, marker (as matplotlib's) and its name in a legend."""

    color: str
    marker: str | tuple[int, int, int]
    label: str


@dataclass(frozen=True)
class UsualContext:
    """What `Selector.usual` may be made from.

    calibrated: captured layers of training sequences. group, head_dim: query heads that share a KV
    head, and their channels. weights: the comparison's hash weights, None where it has none and
    makes no method that needs training. codes: other hash weights by name ("hash 128 bits").
    seed: for methods that draw. steps: at most this many of training, None for a method's own
    number.
    """

    calibrated: Sequence[CapturedLayer]
    group: int
    head_dim: int
    weights: HashWeights | None = None
    codes: Mapping[str, HashWeights] = field(default_factory=dict)
    seed: int = 0
    steps: int | None = None

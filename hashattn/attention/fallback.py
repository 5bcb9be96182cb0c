"""Verified fallback: how much a list of tokens must read, by what it has read.

A list begins with some heavy tokens. The error of each head's output is predicted from two
statistics that cost no further reading; while a head's prediction exceeds the tolerance, the list
doubles its heavy tokens, up to dense (hashattn.attention.fallback_reading). Predictions are
calibrated by conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster 2022):
hashattn.trust.fallback.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hashattn.base.checks import is_number, require
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json, write_json
from hashattn.base.fingerprints import require_same
from hashattn.base.hashes import sha256_text
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.kernels import Rule
from hashattn.models.identity import config_sha256
from hashattn.selectors.calibration import tensors_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hashattn.attention.budget import Budget
    from hashattn.models.heads import HeadSlice
    from hashattn.selectors.base import Selector

# of the regression: what the readings of hashattn.attention.fallback_reading find
_RANKED_TERMS = ("constant", "edge", "change")
_DRAWN_TERMS = ("constant", "bar", "drawn")
TERMS = len(_RANKED_TERMS)
_FORMAT = 1
_RECORD, _TENSORS = "fallback.json", "fallback.safetensors"
_CALIBRATE = "calibrate one with hashattn.trust.fallback.calibrate_fallback"


class FallbackError(HashAttnError, ValueError):
    """A fallback is damaged, or calibrated for another model, method or budget."""


def fallback_fingerprint(
    model: PreTrainedModel, selector: Selector, budget: Budget
) -> dict[str, Any]:
    """What a fallback is valid for, as JSON gives it back: the model's configuration, the method
    with the hash of its weights, and the budget it begins with."""
    parts = {
        "model": {"config_sha256": config_sha256(model.config)},
        "method": selector.record(),
        "budget": asdict(budget),
    }
    return json.loads(json.dumps(parts))


def check_grows(selector: Selector, budget: Budget) -> None:
    """ValueError for a method or a budget whose lists cannot be doubled: by rank, the best tokens
    of a larger budget have to contain those of a smaller one; drawn, every list must be."""
    ranked = selector.ranks and not selector.observes and not selector.evicts and selector.sparse
    allowed = "a method that reads the best of its scores, to be used with a fallback"
    require(ranked, "selector", selector.name, allowed)
    if isinstance(budget.sampled, tuple):
        drawn = all(all(layer) for layer in budget.sampled)
        allowed = "above 0 for every layer and head, or the number 0, to be used with a fallback"
        require(drawn, "budget.sampled", budget.sampled, allowed)


@dataclass(frozen=True, eq=False)
class Fallback:
    """A calibrated rule that fits the budget of each token list to its step.

    tolerance: of the relative L2 error of a head's output against dense attention over the same
    cache. risk: the share of head-steps that may exceed it, on average over sequences exchangeable
    with those of the calibration; nothing is promised for other traffic, or for one head. Captured
    queries and keys are those of a dense run; a sparse run's, from the second layer on, come from
    outputs with an error within the tolerance, and for these the risk is measured, not promised.
    coefficients: layer -> float32 (query heads, levels, 3): log error = constant + first * log of
    the first statistic + second * log of the second (`terms`) with a list at a level; level j has
    2^j times the budget's heavy tokens (at least 2), and the level after the last is dense. Where
    the budget draws tokens, its coins are those of the calibration. start: layer -> int64
    (lists,): the level that each list begins with. factor: what predictions are multiplied by,
    found by conformal risk control. fingerprint: what it is valid for. calibrated: what it was
    calibrated on, counts and lengths. Raises ValueError for parts that do not fit each other.
    """

    tolerance: float
    risk: float
    coefficients: dict[int, Tensor]
    start: dict[int, Tensor]
    factor: float
    fingerprint: dict[str, Any]
    calibrated: dict[str, Any]
    _placed: dict[tuple[str, int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for name in ("tolerance", "risk"):
            value = getattr(self, name)
            require(is_number(value) and 0 < value < 1, name, value, "a number between 0 and 1")
        positive = is_number(self.factor) and self.factor > 0
        require(positive, "factor", self.factor, "a number above 0")
        shapes = {layer: tuple(tensor.shape) for layer, tensor in self.coefficients.items()}
        fits = bool(shapes) and all(len(s) == 3 and s[2] == TERMS for s in shapes.values())
        fits = fits and len({s[1] for s in shapes.values()}) == 1
        allowed = "(query heads, levels, 3), the same levels in each layer"
        require(fits, "coefficients", shapes, allowed)
        finite = all(bool(t.isfinite().all()) for t in self.coefficients.values())
        require(finite, "coefficients", "NaN or infinite numbers", "finite")
        top = self.levels
        for layer, (heads, _, _) in shapes.items():
            levels = self.start.get(layer, torch.zeros(0)).tolist()
            fits = bool(levels) and heads % len(levels) == 0 and 0 <= min(levels) <= max(levels)
            fits = fits and max(levels) <= top
            require(fits, f"start[{layer}]", levels, f"levels 0..{top}, one for each list")

    @property
    def levels(self) -> int:
        """How many levels there are below dense, which is the level of this number."""
        return next(iter(self.coefficients.values())).shape[1]

    @property
    def terms(self) -> tuple[str, ...]:
        """What coefficients are of: those of a budget that ranks, or that draws."""
        return _DRAWN_TERMS if self.fingerprint.get("budget", {}).get("sampled") else _RANKED_TERMS

    @property
    def sha256(self) -> str:
        """Hash of all that decides."""
        numbers = json.dumps([self.tolerance, self.risk, self.factor])
        return sha256_text(numbers + tensors_sha256(self._tensors()))

    def record(self) -> dict[str, Any]:
        """For receipts, JSON-able."""
        names = ("tolerance", "risk", "levels", "sha256", "calibrated")
        return {name: getattr(self, name) for name in names}

    def exceeds(self, layer: int, statistics: Tensor, levels: Tensor) -> Tensor:
        """Whether a list has to read more, bool (batch, lists, q): for some of its heads the
        predicted error is above the tolerance, or no number.

        statistics (batch, heads, q, 2): logs, as of `Reading`; levels (batch, lists, q), those of a
        list that is dense do not matter.
        """
        lists = levels.shape[1]
        group = statistics.shape[1] // lists
        predicted = self.predicted(layer, statistics, levels.repeat_interleave(group, dim=1))
        fine = predicted + math.log(self.factor) <= math.log(self.tolerance)
        return ~fine.unflatten(1, (lists, group)).all(dim=2)

    def predicted(self, layer: int, statistics: Tensor, levels: Tensor) -> Tensor:
        """Log errors by the regression, before `factor`: float32 (batch, heads, q); levels of heads
        (batch, heads, q)."""
        weights = self._on("coefficients", layer, statistics.device)
        heads = torch.arange(len(weights), device=weights.device)[:, None]
        weights = weights[heads, levels.clamp(max=self.levels - 1)]  # (batch, heads, q, 3)
        return weights[..., 0] + (weights[..., 1:] * statistics).sum(-1)

    def rule(self, layer: int, device: torch.device) -> Rule:
        """A layer's part for `kernels.verified_step`: what `exceeds` decides."""
        limit = math.log(self.tolerance) - math.log(self.factor)
        return Rule(self._on("coefficients", layer, device), self.begin(layer, device), limit)

    def begin(self, layer: int, device: torch.device) -> Tensor:
        """`start` of a layer on a device."""
        return self._on("start", layer, device)

    def _on(self, part: str, layer: int, device: torch.device) -> Tensor:
        """Copied once, as a step waits for a copy to a GPU, and as kernels read it."""
        place = part, layer, device
        if place not in self._placed:
            self._placed[place] = getattr(self, part)[layer].to(device).contiguous()
        return self._placed[place]

    def shard(self, part: HeadSlice | None) -> Fallback:
        """The rule for the heads of a process of tensor parallelism; itself for None."""
        if part is None:
            return self
        kept = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        tensors = {name: part.of_layers(kept[name]) for name in ("coefficients", "start")}
        return Fallback(**kept | tensors)

    def require(
        self, model: PreTrainedModel, selector: Selector, budget: Budget, layers: Collection[int]
    ) -> None:
        """FallbackError unless it is of this model, method and budget, and knows these layers;
        ValueError for a method or budget that no fallback can have."""
        check_grows(selector, budget)
        now = fallback_fingerprint(model, selector, budget)
        remedy = f"{_CALIBRATE} for this one"
        require_same("fallback", self.fingerprint, now, FallbackError, remedy)
        missing = sorted(set(layers) - set(self.coefficients))
        if missing:
            raise FallbackError(
                f"this fallback was not calibrated for layers {missing}: keep them dense "
                f"(dense_layers), or {_CALIBRATE} with all layers captured"
            )

    def save(self, folder: str | os.PathLike) -> Path:
        """Write fallback.json and .safetensors into a folder. Raises WriteError."""
        folder = Path(folder)
        write_tensors(folder / _TENSORS, {k: t.clone() for k, t in self._tensors().items()})
        record = {name: getattr(self, name) for name in _PLAIN}
        record |= {"format": _FORMAT, "terms": list(self.terms), "sha256": self.sha256}
        write_json(folder / _RECORD, record)  # last: a record has its tensors
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Fallback:
        """Read what `save` wrote. FallbackError for anything else."""
        path = Path(folder) / _RECORD
        record = read_json(path, FallbackError)
        damaged = FallbackError(f"{path} is not a fallback: copy both files again, or {_CALIBRATE}")
        if not isinstance(record, dict) or not {"format", "sha256", *_PLAIN} <= set(record):
            raise damaged
        known = [list(terms) for terms in (_RANKED_TERMS, _DRAWN_TERMS)]
        if record["format"] != _FORMAT or record.get("terms") not in known:
            raise FallbackError(f"{path} was written by another version of hashattn: {_CALIBRATE}")
        tensors = read_tensors(path.with_name(_TENSORS), FallbackError, _CALIBRATE)
        parts: dict[str, dict[int, Tensor]] = {"coefficients": {}, "start": {}}
        try:
            for name, tensor in tensors.items():
                part, _, layer = name.partition(".")
                parts[part][int(layer)] = tensor
            fallback = cls(**{name: record[name] for name in _PLAIN}, **parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged from error
        if fallback.sha256 != record["sha256"]:
            raise FallbackError(
                f"{path} and {_TENSORS} are not of one fallback, or were changed: copy both again, "
                f"or {_CALIBRATE}"
            )
        return fallback

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"coefficients": self.coefficients, "start": self.start}
        return {f"{part}.{layer}": t for part, by in parts.items() for layer, t in by.items()}


_PLAIN = ("tolerance", "risk", "factor", "fingerprint", "calibrated")

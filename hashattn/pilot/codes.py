"""The codes of a pilot: those shipped with the model, or codes calibrated on the company's text
where these find more of what dense attention reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hashattn.base.files import write_json
from hashattn.base.progress import say
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.transform import calibrate_transform
from hashattn.hashing.weights import HashWeights
from hashattn.models.identity import base_model_record, code_version, fingerprint, model_sha256
from hashattn.pilot.plan import Plan, PlanError
from hashattn.pilot.settings import PilotSettings
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.oracle import OracleSelector

_BITS = 64  # of calibrated codes: their output error is that of twice as many learned ones
_ENOUGH = 0.97  # shipped codes that find this share of what exact top-k finds are kept
_CALIBRATE = 6  # contexts at most
_EVERY = 8  # of a context's rows, how many are looked at: every eighth
_JUDGED = 64  # of the last tokens of a context, every second row


@dataclass(frozen=True)
class PilotCodes:
    """Codes that were chosen, and why.

    mass: share of dense attention's weight on the tokens that they select, mean over layers, on
    calibration text that none of them saw; of_exact: that of the best possible selection; before:
    of shipped codes that were replaced. origin: "shipped" or "calibrated"; tokens: calibrated on;
    place: the folder that they are in. All masses are None where there was no calibration text.
    """

    weights: HashWeights
    place: Path
    origin: str
    mass: float | None
    of_exact: float | None
    before: float | None
    tokens: int

    @property
    def selector(self) -> HashSelector:
        """The method that ranks by these codes."""
        return HashSelector.as_trained(self.weights)

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        config = self.weights.config
        return {
            "method": "transform" if config.folds else "hash", "bits": config.bits,
            "origin": self.origin, "mass": self.mass, "mass_of_exact": self.of_exact,
            "mass_before": self.before, "tokens": self.tokens,
            "bytes_per_token": len(config.layers) * config.key_maps * config.bits // 8,
        }  # fmt: skip


def choose_codes(
    model: Any, tokenizer: Any, plan: Plan, settings: PilotSettings, folder: str | Path,
    shipped: str | Path | None = None,
) -> PilotCodes:  # fmt: skip
    """Shipped codes (a folder of hash weights), unless on the company's own text they miss 3 % or
    more of the attention that exact top-k reads and calibrated codes miss less.

    Only documents of the plan's calibration part are read; one context of them measures, the rest
    calibrates. Calibrated codes are saved in `folder`, by what they were made of, and found again.
    PlanError where there are neither shipped codes nor text for calibration; errors of
    HashWeights.load.
    """
    weights = None if shipped is None else HashWeights.load(shipped, model)
    *learn, judge = _sequences(tokenizer, plan) or [None]
    if judge is None or (not learn and weights is None):
        if weights is None:
            raise PlanError(
                "these documents are too few to calibrate codes on text that is not scored: give "
                "a folder with at least four documents, or with text for several contexts, or a "
                "shorter context"
            )
        return PilotCodes(weights, Path(shipped), "shipped", None, None, None, 0)
    captured = _judged(model, judge)
    exact = _mass(captured, OracleSelector(), settings)
    own = None if weights is None else _mass(captured, HashSelector.as_trained(weights), settings)
    if own is not None and (own >= _ENOUGH * exact or not learn):
        return PilotCodes(weights, Path(shipped), "shipped", own, exact, None, 0)
    tokens = sum(map(len, learn))
    calibrated, place = _calibrated(model, learn, Path(folder))
    mass = _mass(captured, HashSelector.as_trained(calibrated), settings)
    if own is not None and own >= mass:
        return PilotCodes(weights, Path(shipped), "shipped", own, exact, None, 0)
    return PilotCodes(calibrated, place, "calibrated", mass, exact, own, tokens)


def _sequences(tokenizer: Any, plan: Plan) -> list[list[int]]:
    """Token ids of the calibration contexts, the longest last; a single one in two halves."""
    texts = [context.text for context in plan.learning[: _CALIBRATE + 1]]
    ids = sorted((tokenizer(text)["input_ids"] for text in texts), key=len)
    if len(ids) == 1:
        half = len(ids[0]) // 2
        return [ids[0][:half], ids[0][half:]] if half > _JUDGED else []
    return ids


def _judged(model: Any, ids: Sequence[int]) -> list[CapturedLayer]:
    rows = torch.arange(max(0, len(ids) - _JUDGED), len(ids), 2)
    return list(capture(model, torch.tensor(ids), rows=rows).values())


def _mass(captured: Sequence[CapturedLayer], selector: Any, settings: PilotSettings) -> float:
    """Share of attention on what a selector reads at the middle budget, mean over layers."""
    density = settings.budgets[len(settings.budgets) // 2]
    tokens = captured[0].keys.shape[1]
    heavy = max(1, round(density * tokens) - settings.sink - settings.local)
    rows = selection_metrics(captured, {"": selector}, [heavy], settings.sink, settings.local)
    return sum(row["mass"] for row in rows) / len(rows)


def _calibrated(
    model: Any, sequences: Sequence[Sequence[int]], folder: Path
) -> tuple[HashWeights, Path]:
    key = fingerprint(
        [model_sha256(model), code_version(), _BITS, _EVERY, [list(ids) for ids in sequences]]
    )[:16]
    place = folder / f"codes-{key}"
    if (place / "made.json").is_file():
        return HashWeights.load(place, model), place
    say(f"calibrating codes on {sum(map(len, sequences)):,} tokens of the documents")
    card = {"base_model": base_model_record(model)}
    weights = calibrate_transform(_captures(model, sequences), bits=_BITS, card=card)
    weights.save(place)
    write_json(place / "made.json", {"sequences": len(sequences), "key": key})
    return weights, place


def _captures(model: Any, sequences: Sequence[Sequence[int]]) -> Iterator[CapturedLayer]:
    for ids in sequences:
        rows = torch.arange(_EVERY - 1, len(ids), _EVERY)
        yield from capture(model, torch.tensor(ids), rows=rows).values()

"""The drift monitor: an observer that tells when traffic no longer looks like its reference.

An alarm of shift is not an alarm of harm: selection may read other text as well as before. It says
that what was measured and calibrated on the reference no longer speaks for this traffic: look at
recall and missed mass of the sampled steps, calibrate what depends on it anew, or adapt the hashes.
Longer contexts than the reference's are a shift too, as codes of keys depend on their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hashattn.base.checks import require, require_numbers
from hashattn.trust.drift.evidence import EDetectors
from hashattn.trust.drift.reading import Readings, StepReader
from hashattn.trust.drift.reference import CODES, DriftError, DriftReference
from hashattn.trust.drift.report import (
    ALARM,
    OK,
    WARN,
    Cause,
    DriftReport,
    LayerReport,
    StatisticReport,
)
from hashattn.trust.drift.statistics import STATISTICS, bit_rates, bits_of

if TYPE_CHECKING:
    from hashattn.attention.attachment import Attachment

_LARGEST = 600.0  # logarithm of the evidence that is shown
_RECENT = 256  # values that a recent mean is over, about
_POINTS = 512  # of the kept curve of evidence, at most
_INTENDED = ("sliding_window", "dense_layer", "dense_selector")  # dense because someone chose so


@dataclass(frozen=True)
class DriftSettings:
    """every: tokens after which what they said is taken in, together; an alarm is late by up to so
    many less one. seed: of the draw of the steps that are audited (the reference's share of them),
    and of what breaks ties.

    false_alarms, horizon: an alarm although nothing changed, in any layer by any statistic, has at
    most this probability within `horizon` tokens from the start or a reset, if the tokens' values
    are exchangeable with the reference's; the mean time to the first is then at least horizon / (2
    false_alarms) tokens. warnings: the same for warnings. What is assumed, and why it holds:
    hashattn.trust.drift.evidence.
    Raises ValueError naming the field, its value and what is allowed.
    """

    every: int = 16
    seed: int = 0
    horizon: int = 10_000
    false_alarms: float = 0.02
    warnings: float = 0.2

    def __post_init__(self) -> None:
        numbers = {"every": self.every, "seed": self.seed, "horizon": self.horizon}
        require_numbers(numbers, counts={"every": 1, "seed": 0, "horizon": 1})
        require_numbers({"false_alarms": self.false_alarms}, positive=["false_alarms"])
        require(self.false_alarms < 1, "false_alarms", self.false_alarms, "below 1")
        require_numbers({"warnings": self.warnings}, positive=["warnings"])
        valid = self.false_alarms <= self.warnings <= 1
        require(valid, "warnings", self.warnings, "at least false_alarms and at most 1")

    @property
    def warn_at(self) -> float:
        """Evidence of a warning, where 1 is an alarm's."""
        return self.false_alarms / self.warnings


class Watch:
    """The tests of all statistics and layers over standardised values, without a model.

    streams: (statistic, layer, or the number of layers for all of them) of each detector. Half of
    the allowed false alarms belongs to the means over all layers, half to single layers; statistics
    share evenly.
    """

    def __init__(self, reference: DriftReference, settings: DriftSettings) -> None:
        enough = reference.usable
        self.streams = np.argwhere(enough)
        if not len(self.streams):
            raise DriftError(
                "this drift reference has too few values of every statistic: let DriftCalibrator "
                "listen to more traffic"
            )
        statistics = len({statistic for statistic, _ in self.streams.tolist()})
        all_layers = self.streams[:, 1] == len(reference.layers)
        singles = enough[:, :-1].sum(1)[self.streams[:, 0]]
        weights = np.where(all_layers, 0.5, 0.5 / np.maximum(singles, 1)) / statistics
        self._offset = np.log(weights * settings.false_alarms / settings.horizon)
        streams = tuple(self.streams.T)
        rng = np.random.default_rng(settings.seed)
        self.detectors = EDetectors(reference.counts[streams], rng, reference.exponents[streams])
        self.log_evidence = np.full(len(self.streams), -np.inf)

    def reset(self) -> None:
        """Start anew."""
        self.detectors.reset()
        self.log_evidence[:] = -np.inf

    def update(self, z: np.ndarray, first: int) -> np.ndarray:
        """Log evidence (rows, streams) after each row of z (rows, statistics, layers + 1); 0 and
        more is an alarm. first: the number of the first row."""
        path = self.detectors.update(z[:, *self.streams.T], first) + self._offset
        if len(path):
            self.log_evidence = path[-1]
        return path


class DriftMonitor(StepReader):
    """An observer that tests whether running traffic is still like its reference.

    with run.listen(DriftMonitor(run, reference)) as monitor:
        ...
        report = monitor.report()

    Raises DriftError for a reference of another model, method or budget. Threads may share a
    monitor. Alarms stay until `reset`. Memory does not grow with the run (`nbytes`).

    It watches tokens that are decoded, not prompts: a prompt of another kind shows as far as what
    is generated after it differs.

    What is tested, of every token and layer: "key_surprise", bits of surprise of the new key's
    code. On the sampled share: "query_surprise", "margin" of the lowest selected score, "recall" of
    the best tokens and "missed_mass" of exact attention. A statistic that a method does not have,
    such as code surprise without codes, is absent. Counted, not tested: dense calls by reason, and
    how often each bit of the codes is 1.
    """

    def __init__(
        self, run: Attachment, reference: DriftReference, settings: DriftSettings | None = None
    ) -> None:
        settings = settings or DriftSettings()
        reference.require(run.receipt)
        super().__init__(run, reference.share, settings.seed, reference.top, settings.every)
        self.reference, self.settings = reference, settings
        self._usual_rates = {
            (name, layer): bit_rates(table)
            for name, by_layer in reference.tables.items()
            for layer, table in by_layer.items()
        }
        self._watch = Watch(reference, settings)
        shape = len(STATISTICS), len(reference.layers) + 1
        self._recent, self._seen = np.zeros(shape), np.zeros(shape, np.int64)
        self._places = [None if place == len(reference.layers) else reference.layers[place]
                        for place in range(shape[1])]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Forget evidence, alarms and counts; the reference stays. For when a shift was dealt with,
        or turned out to be harmless."""
        with self._lock:
            self._watch.reset()
            self._pending.clear()
            self._rows_by_reason.clear()
            self._recent[:], self._seen[:] = 0, 0
            self._bit_rates = {place: rates.copy() for place, rates in self._usual_rates.items()}
            self._steps, self._causes = 0, {}
            self._curve: list[tuple[int, list[float]]] = []
            self._stride = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the state that lives as long as the monitor, without the bounded curve of
        evidence and the codes of steps not yet taken in."""
        tables = [table for part in self.reference.tables.values() for table in part.values()]
        arrays = (*tables, *self._bit_rates.values(), self._recent, self._seen)
        return self._watch.detectors.nbytes + sum(array.nbytes for array in arrays)

    def _take(self, readings: Readings) -> None:
        if not readings.rows:
            return
        values = self.reference.values(readings)
        z = self.reference.standardised(values)
        self._average(np.concatenate([values, z[..., -1:]], axis=2))
        self._count_bits(readings)
        path = self._watch.update(z, self._steps)
        alarms = path >= 0
        for stream in alarms.any(0).nonzero()[0]:
            statistic, place = self._watch.streams[stream]
            if self._places[place] in self._causes:
                continue
            row = alarms[:, stream].argmax()
            cause = Cause(
                STATISTICS[statistic], self._places[place], self._watch.detectors.rises(stream),
                self._steps + int(row), self._watch.detectors.since(stream),
            )  # fmt: skip
            self._causes[cause.layer] = cause
        self._draw_on(path)
        self._steps += readings.rows

    def _average(self, values: np.ndarray) -> None:
        number = (~np.isnan(values)).sum(0)
        self._seen += number
        mean = np.where(np.isnan(values), 0, values).sum(0) / np.maximum(number, 1)
        share = np.minimum(1, number / np.maximum(np.minimum(self._seen, _RECENT), 1))
        self._recent += (mean - self._recent) * share

    def _count_bits(self, readings: Readings) -> None:
        for name, kind in CODES.items():
            for layer, (_, codes) in getattr(readings, kind).items():
                rates = self._bit_rates.get((name, layer))
                if rates is not None:
                    share = min(1.0, len(codes) / _RECENT)
                    rates += (bits_of(codes).mean(0) - rates) * share

    def _draw_on(self, path: np.ndarray) -> None:
        """Add rows of log evidence (rows, streams) to the curve; where it is full, every second
        point goes, and so will those that follow."""
        steps = self._steps + 1 + np.arange(len(path))
        drawn = steps % self._stride == 0
        places = [path[drawn][:, self._watch.streams[:, 1] == place].max(1, initial=-np.inf)
                  for place in range(len(self._places))]  # fmt: skip
        self._curve += zip(steps[drawn].tolist(), np.stack(places, 1).tolist(), strict=True)
        while len(self._curve) > _POINTS:
            self._stride *= 2
            self._curve = [point for point in self._curve if point[0] % self._stride == 0]

    def _of(self, place: int) -> np.ndarray:
        return self._watch.log_evidence[self._watch.streams[:, 1] == place]

    @property
    def curve(self) -> tuple[np.ndarray, dict[int | None, np.ndarray]]:
        """Steps (points,) and evidence (points,) of each layer and of the mean over layers (None),
        thinned out as the run grows; 1 is an alarm."""
        with self._lock:
            steps = np.array([step for step, _ in self._curve], int)
            logs = np.array([values for _, values in self._curve]).reshape(-1, len(self._places))
        return steps, {layer: _evidence(logs[:, i]) for i, layer in enumerate(self._places)}

    def report(self) -> DriftReport:
        """The state after this thread's last finished call; call it between calls of the model."""
        self.flush()
        with self._lock:
            layers = [self._layer_report(place) for place in range(len(self.reference.layers))]
            return DriftReport(
                steps=self._steps,
                overall=self._overall(layers),
                layers=tuple(layers),
                warn_at=self.settings.warn_at,
                horizon=self.settings.horizon,
                false_alarms=self.settings.false_alarms,
            )

    def _overall(self, layers: list[LayerReport]) -> LayerReport:
        mine = self._layer_report(len(layers))
        parts = [mine, *layers]
        causes = sorted((part.cause for part in parts if part.cause), key=lambda cause: cause.step)
        calls: dict[str, int] = {}
        for (_, reason), rows in self._rows_by_reason.items():
            if reason not in _INTENDED:
                calls[reason or "sparse"] = calls.get(reason or "sparse", 0) + rows
        states = [part.state for part in parts]
        return LayerReport(
            layer=None,
            state=next(state for state in (ALARM, WARN, OK) if state in states),
            evidence=max(part.evidence for part in parts),
            cause=causes[0] if causes else None,
            statistics=mine.statistics,
            calls=calls,
            dense=_dense(calls),
            bits={},
        )

    def _layer_report(self, place: int) -> LayerReport:
        layer = self._places[place]
        cause = self._causes.get(layer)
        evidence = float(_evidence(self._of(place).max(initial=-np.inf)))
        calls = {reason or "sparse": rows for (of, reason), rows in self._rows_by_reason.items()
                 if of == layer}  # fmt: skip
        state = ALARM if cause else WARN if evidence >= self.settings.warn_at else OK
        return LayerReport(
            layer, state, evidence, cause, self._statistics(place), calls, _dense(calls),
            self._bits(layer),
        )  # fmt: skip

    def _statistics(self, place: int) -> dict[str, StatisticReport]:
        overall = place == len(self.reference.layers)
        reports = {}
        for stream, (statistic, of) in enumerate(self._watch.streams.tolist()):
            if of == place:
                mean = 0.0 if overall else float(self.reference.means[statistic, place])
                scale = 1.0 if overall else float(self.reference.scales[statistic, place])
                seen = int(self._seen[statistic, place])
                recent = float(self._recent[statistic, place]) if seen else None
                evidence = float(_evidence(self._watch.log_evidence[stream]))
                reports[STATISTICS[statistic]] = StatisticReport(
                    mean, scale, recent, seen, evidence
                )
        return reports

    def _bits(self, layer: int | None) -> dict[str, dict[str, float]]:
        reports = {}
        for name, kind in CODES.items():
            usual = self._usual_rates.get((name, layer))
            if usual is not None:
                rates = self._bit_rates[name, layer]
                reports[kind] = {
                    "entropy": _entropy(rates),
                    "usual_entropy": _entropy(usual),
                    "moved": float(abs(rates - usual).mean()),
                }
        return reports


def _evidence(logs: np.ndarray | float) -> np.ndarray | float:
    """Evidence of its logarithm, finite."""
    return np.exp(np.minimum(logs, _LARGEST))


def _dense(calls: dict[str, int]) -> float:
    """Share of tokens that were not read sparse."""
    total = sum(calls.values())
    return 1 - calls.get("sparse", 0) / total if total else 0.0


def _entropy(rates: np.ndarray) -> float:
    """Bits of entropy of a code with these rates (heads, bits), mean over heads."""
    p = rates.clip(1e-12, 1 - 1e-12)
    return float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum(1).mean())

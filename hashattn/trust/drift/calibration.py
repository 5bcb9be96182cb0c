"""Learning a drift reference from in-domain traffic, streamed, in constant memory."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hashattn.base.checks import is_number, require, require_numbers
from hashattn.trust.drift.evidence import BETS, BINS, MOST_OPEN, EDetectors, Exponents
from hashattn.trust.drift.reading import Readings, StepReader, all_codes
from hashattn.trust.drift.reference import CODES, LEAST, DriftError, DriftReference, fingerprint
from hashattn.trust.drift.statistics import KEY_SURPRISE, STATISTICS, count_bytes, surprise_tables

if TYPE_CHECKING:
    from hashattn.attention.attachment import Attachment
    from hashattn.attention.observer import LayerStep

_LEAST_SCALED = 16  # values without which a statistic has no scale
_LEAST_SEQUENCES = 8
_MOST_CLASSES = 16


class DriftCalibrator(StepReader):
    """An observer that learns a DriftReference from in-domain traffic, in constant memory.

    with run.listen(DriftCalibrator(run)) as calibrator:
        for prompt in traffic: model.generate(...)
    reference = calibrator.reference()

    Every step is audited, so it is slow: calibrate off line, on traffic that is representative of
    what will come. How far apart sequences of one kind are is learned too, so a few dozen tokens of
    each of a hundred sequences tell more than thousands of tokens of ten.

    share: of the steps that monitors will audit. warmup: sequences from which byte tables (the
    first half; keys of whole contexts) and scales (the second) are learned; they are not counted
    afterwards, so that the rest is exchangeable with what the monitor will see. top: k of recall@k.
    """

    def __init__(
        self, run: Attachment, *, share: float = 0.01, warmup: int = 24, top: int = 32
    ) -> None:
        require_numbers({"warmup": warmup, "top": top}, counts={"warmup": 2, "top": 1})
        valid = is_number(share) and 0 < share <= 1
        require(valid, "share", share, "a number in (0, 1]")
        super().__init__(run, share=1.0, seed=0, top=top, every=1)
        self._audited, self._warmup = share, warmup
        self._fingerprint = fingerprint(run.receipt)
        self._bytes: dict[str, dict[int, np.ndarray]] = {name: {} for name in CODES}
        self._coded: dict[tuple[int, int], int] = {}
        self._moments: dict[tuple[str, int], np.ndarray] = {}  # number, sum, sum of squares
        self._sequences, self._last = 0, -1
        self._counting: _Counting | None = None

    def _read(self, step: LayerStep, call: Any) -> None:
        super()._read(step, call)
        if self._codes and self._sequences < self._warmup // 2:
            self._count_context(step)

    def _count_context(self, step: LayerStep) -> None:
        """Count the codes of all keys of a context, at its first sparse step."""
        place = threading.get_ident(), step.layer
        context = self._local.context
        if self._coded.get(place) != context:
            self._coded[place] = context
            with self._lock:
                self._add_bytes(KEY_SURPRISE, step.layer, all_codes(step))

    def _add_bytes(self, name: str, layer: int, codes: np.ndarray) -> None:
        known = self._bytes[name]
        known[layer] = known.get(layer, 0) + count_bytes(codes)

    def _take(self, readings: Readings) -> None:
        served = np.unique(readings.sequences).tolist()
        most = min(self._warmup // 2, MOST_OPEN)
        if len(served) > most:
            raise DriftError(
                f"a batch of {len(served)} sequences: calibrate with at most {most} at a time"
                + (" or a larger warmup" if most < MOST_OPEN else "")
            )
        for sequence in served:
            if sequence > self._last:
                self._sequences, self._last = self._sequences + 1, sequence
        if self._sequences <= self._warmup // 2:
            for name, kind in CODES.items():
                for layer, (_, codes) in getattr(readings, kind).items():
                    self._add_bytes(name, layer, codes)
        elif self._sequences <= self._warmup:
            readings.add_surprise(self._tables)
            self._learn_scales(readings)
        else:
            if self._counting is None:
                self._counting = _Counting(self._begin_counting())
            self._counting.add(readings)

    @cached_property
    def _tables(self) -> dict[str, dict[int, np.ndarray]]:
        return {
            name: {layer: surprise_tables(counts) for layer, counts in by_layer.items()}
            for name, by_layer in self._bytes.items()
        }

    def _learn_scales(self, readings: Readings) -> None:
        for name, by_layer in readings.values.items():
            for layer, values in by_layer.items():
                x = values[~np.isnan(values)]
                moments = np.array([len(x), x.sum(), (x * x).sum()])
                self._moments[name, layer] = self._moments.get((name, layer), 0) + moments

    def _begin_counting(self) -> DriftReference:
        layers = tuple(sorted({layer for _, layer in self._moments}))
        shape = len(STATISTICS), len(layers)
        means, scales = np.full(shape, np.nan), np.full(shape, np.nan)
        for (name, layer), (number, total, squares) in self._moments.items():
            mean = total / max(number, 1)
            variance = squares / max(number, 1) - mean * mean
            if number >= _LEAST_SCALED and variance > 1e-9 * (1 + mean * mean):
                place = STATISTICS.index(name), layers.index(layer)
                means[place], scales[place] = mean, variance**0.5
        per_layer = shape[0], shape[1] + 1
        return DriftReference(
            self._fingerprint, self._top, float(self._audited), layers, 0, self._tables, means,
            scales, np.zeros((*per_layer, BINS), np.int64), np.ones((*per_layer, *BETS)),
        )  # fmt: skip

    def reference(self) -> DriftReference:
        """What was learned so far. DriftError for too little sparse traffic."""
        self.flush()
        with self._lock:
            counted = max(0, self._sequences - self._warmup)
            learned = None if self._counting is None else self._counting.learned(counted)
            if counted < _LEAST_SEQUENCES or not learned.usable.any():
                raise DriftError(
                    f"{self._sequences} sequences ran sparse while this calibrator listened, of "
                    f"which {self._warmup} are warm-up; at least {_LEAST_SEQUENCES} more, with "
                    f"{LEAST} tokens, are needed: let it listen to more traffic"
                )
            return learned


class _Counting:
    """The part of calibration that the monitor's p-values are compared with."""

    def __init__(self, empty: DriftReference) -> None:
        self._reference = empty
        shape = empty.counts.shape
        self._detectors = EDetectors(empty.counts.reshape(-1, BINS), np.random.default_rng(0))
        thinned = min(_MOST_CLASSES, max(1, round(1 / empty.share)))
        classes = np.full(shape[:2], thinned)
        classes[STATISTICS.index(KEY_SURPRISE)] = 1
        self._exponents = Exponents(classes.ravel())

    def add(self, readings: Readings) -> None:
        z = self._reference.standardised(self._reference.values(readings))
        z = z.reshape(len(z), -1)
        compared = self._detectors.seen >= 4 * LEAST  # few values give no small p-values
        p = np.where(compared, self._detectors.p_values(z), np.nan)
        for sequence, row in zip(readings.sequences.tolist(), p, strict=True):
            self._exponents.add(sequence, row)

    def learned(self, sequences: int) -> DriftReference:
        """The reference by all that was added."""
        shape = self._reference.exponents.shape
        counts = self._detectors.counts.reshape(self._reference.counts.shape)
        exponents = self._exponents.learned().reshape(shape)
        return replace(
            self._reference, counts=counts.copy(), exponents=exponents, sequences=sequences
        )

"""What traffic is compared with: statistics of in-domain traffic, streamed, and their artefact."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hashattn.base.checks import is_count, is_number, require, require_numbers
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json, write_json
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.trust.drift.evidence import BETS, BINS, EDetectors, Exponents
from hashattn.trust.drift.reading import (
    KEY_SURPRISE,
    QUERY_SURPRISE,
    STATISTICS,
    Readings,
    StepReader,
    all_codes,
    count_bytes,
    surprise_tables,
)

if TYPE_CHECKING:
    from hashattn.attention.attachment import Attachment
    from hashattn.attention.observer import LayerStep
    from hashattn.attention.receipt import Receipt

CODES = {KEY_SURPRISE: "keys", QUERY_SURPRISE: "queries"}
_LEAST = 64  # values of a statistic without which it is left out
_LEAST_SCALED = 16  # values without which a statistic has no scale
_LEAST_SEQUENCES = 8
_MOST_CLASSES = 16
_FORMAT = 1
_RECORD, _ARRAYS = "drift_reference.json", "drift_reference.safetensors"
_CALIBRATE = "calibrate one with hashattn.trust's DriftCalibrator"


class DriftError(HashAttnError, ValueError):
    """A drift reference is damaged, too small, or of another model, method or budget."""


def fingerprint(receipt: Receipt) -> dict[str, Any]:
    """What a reference is valid for: the model's configuration, the method with the hash of its
    weights, and the budget. How many rows a call may have does not matter."""
    settings = {k: v for k, v in receipt.settings.items() if k != "sparse_rows"}
    parts = {
        "model": {"config_sha256": receipt.model["config_sha256"]},
        "method": receipt.method,
        "budget": settings,
    }
    return _as_json(parts)


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(part) for key, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, eq=False)
class DriftReference:
    """In-domain traffic, as much of it as the monitor needs.

    fingerprint: what it is valid for. top: k of recall@k. share: of the steps that a monitor
    audits. layers: those that ran sparse. sequences: how many were counted. tables: statistic
    "key_surprise" or "query_surprise" -> layer -> surprise_tables (heads, bytes, 256). means,
    scales (statistics, layers): mean and standard deviation of a token's value, NaN where a layer
    has none. counts (statistics, layers + 1, BINS): how often the standardised values fell into
    each bin; the last of axis 1 is of their mean over all layers. exponents (statistics, layers +
    1, *BETS): how bets are damped, see hashattn.trust.drift.evidence.
    """

    fingerprint: dict[str, Any]
    top: int
    share: float
    layers: tuple[int, ...]
    sequences: int
    tables: dict[str, dict[int, np.ndarray]]
    means: np.ndarray
    scales: np.ndarray
    counts: np.ndarray
    exponents: np.ndarray

    @property
    def observations(self) -> np.ndarray:
        """Values counted, (statistics, layers + 1)."""
        return self.counts.sum(-1)

    @property
    def usable(self) -> np.ndarray:
        """Whether there are enough values to compare with, (statistics, layers + 1)."""
        return self.observations >= _LEAST

    def values(self, readings: Readings) -> np.ndarray:
        """Values (rows, statistics, layers) of readings, NaN where there is none; turns codes into
        surprise first."""
        readings.add_surprise(self.tables)
        values = np.full((readings.rows, *self.means.shape), np.nan)
        for row, name in enumerate(STATISTICS):
            for column, layer in enumerate(self.layers):
                if layer in readings.values.get(name, {}):
                    values[:, row, column] = readings.values[name][layer]
        return values

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """(rows, statistics, layers + 1) of `values`: less the mean, over the standard deviation,
        and last their mean over all layers that have the statistic, NaN where one lacks it."""
        z = (values - self.means) / self.scales
        known = ~np.isnan(self.means)
        number = np.maximum(known.sum(1), 1)
        summed = np.where(known, z, 0).sum(2)  # NaN where a layer that has the statistic lacks it
        overall = np.where(known.any(1), summed / number, np.nan)
        return np.concatenate([z, overall[..., None]], axis=2)

    def require(self, receipt: Receipt) -> None:
        """DriftError unless the reference is of this model, method and budget."""
        now = fingerprint(receipt)
        for part, ours in self.fingerprint.items():
            names = sorted(
                name for name in {*ours, *now[part]} if ours.get(name) != now[part].get(name)
            )
            if names:
                raise DriftError(
                    f"this drift reference is of another {part}: {_shown(ours, names)} there, "
                    f"{_shown(now[part], names)} here; {_CALIBRATE} on this attachment"
                )

    def save(self, folder: str | os.PathLike) -> Path:
        """Write drift_reference.json and .safetensors into a folder. Raises WriteError."""
        folder, arrays = Path(folder), self._arrays()
        write_tensors(folder / _ARRAYS, {k: torch.from_numpy(v) for k, v in arrays.items()})
        record = {"format": _FORMAT, "statistics": list(STATISTICS), "sha256": _sha256(arrays)}
        record |= {name: getattr(self, name) for name in _PLAIN}
        write_json(folder / _RECORD, record)  # last: a record has its arrays
        return folder

    def _arrays(self) -> dict[str, np.ndarray]:
        tables = {
            f"{name}.{layer}": table
            for name, by_layer in self.tables.items()
            for layer, table in by_layer.items()
        }
        return {name: getattr(self, name) for name in _ARRAY_FIELDS} | tables

    @classmethod
    def load(cls, folder: str | os.PathLike) -> DriftReference:
        """Read what `save` wrote. DriftError for anything else."""
        path = Path(folder) / _RECORD
        record = read_json(path, DriftError)
        damaged = DriftError(
            f"{path} is not a drift reference: copy both files again, or {_CALIBRATE}"
        )
        if not isinstance(record, dict) or not {"format", "sha256", *_PLAIN} <= set(record):
            raise damaged
        if record["format"] != _FORMAT or record.get("statistics") != list(STATISTICS):
            raise DriftError(f"{path} was written by another version of hashattn: {_CALIBRATE}")
        tensors = read_tensors(path.with_name(_ARRAYS), DriftError, _CALIBRATE)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        if _sha256(arrays) != record["sha256"]:
            raise DriftError(
                f"{path} and {_ARRAYS} are not of one reference: copy both again, or {_CALIBRATE}"
            )
        try:
            tables: dict[str, dict[int, np.ndarray]] = {name: {} for name in CODES}
            for name in sorted(set(arrays) - set(_ARRAY_FIELDS)):
                statistic, _, layer = name.partition(".")
                tables[statistic][int(layer)] = arrays[name]
            plain = {name: record[name] for name in _PLAIN} | {"layers": tuple(record["layers"])}
            reference = cls(
                **plain, tables=tables, **{name: arrays[name] for name in _ARRAY_FIELDS}
            )
            _check(reference)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged from error
        return reference


_ARRAY_FIELDS = ("means", "scales", "counts", "exponents")
_PLAIN = tuple(
    field.name for field in fields(DriftReference) if field.name not in (*_ARRAY_FIELDS, "tables")
)


def _check(reference: DriftReference) -> None:
    """ValueError for parts that do not fit each other."""
    statistics, layers = shape = len(STATISTICS), len(reference.layers)
    shapes = {"means": shape, "scales": shape, "counts": (statistics, layers + 1, BINS),
              "exponents": (statistics, layers + 1, *BETS)}  # fmt: skip
    for name, expected in shapes.items():
        require(getattr(reference, name).shape == expected, name, "...", f"of shape {expected}")
    share = is_number(reference.share) and 0 < reference.share <= 1
    require(share, "share", reference.share, "a number in (0, 1]")
    require(is_count(reference.top), "top", reference.top, "a positive integer")
    parts = set(reference.fingerprint)
    require(parts == {"model", "method", "budget"}, "fingerprint", parts, "model, method, budget")


def _shown(part: dict[str, Any], names: list[str]) -> str:
    """The named entries of a fingerprint, long ones shortened."""
    return ", ".join(f"{name} {str(part.get(name))[:40]}" for name in names)


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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
        super().__init__(run.selector, share=1.0, seed=0, top=top, every=1)
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
        for sequence in np.unique(readings.sequences).tolist():
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
                    f"{_LEAST} tokens, are needed: let it listen to more traffic"
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
        compared = self._detectors.seen >= 4 * _LEAST  # few values give no small p-values
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

"""What traffic is compared with: statistics of in-domain traffic, streamed, and their artefact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hashattn.base.checks import is_count, is_number, require
from hashattn.base.files import read_json, write_json
from hashattn.base.fingerprints import require_same
from hashattn.base.tensors import read_tensors, write_tensors
from hashattn.selectors.calibration import tensors_sha256
from hashattn.trust.drift.errors import DriftError
from hashattn.trust.drift.evidence import BETS, BINS
from hashattn.trust.drift.reading import Readings
from hashattn.trust.drift.statistics import (
    KEY_SURPRISE,
    QUERY_SURPRISE,
    STATISTICS,
)

if TYPE_CHECKING:
    from hashattn.attention.receipt import Receipt

CODES = {KEY_SURPRISE: "keys", QUERY_SURPRISE: "queries"}
LEAST = 64  # values of a statistic without which it is left out
_FORMAT = 1
_RECORD, _ARRAYS = "drift_reference.json", "drift_reference.safetensors"
_CALIBRATE = "calibrate one with hashattn.trust's DriftCalibrator"


def fingerprint(receipt: Receipt) -> dict[str, Any]:
    """What a reference is valid for: the model's configuration, the method with the hash of its
    weights, the budget, and the heads of this process. How many rows a call may have does not
    matter: rows are sampled, not calls."""
    settings = {k: v for k, v in receipt.settings.items() if k != "sparse_rows"}
    parts = {
        "model": {"config_sha256": receipt.model["config_sha256"], "heads": receipt.heads},
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
        return self.observations >= LEAST

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
        remedy = f"{_CALIBRATE} on this attachment"
        require_same("drift reference", self.fingerprint, fingerprint(receipt), DriftError, remedy)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write drift_reference.json and .safetensors into a folder. Raises WriteError."""
        folder = Path(folder)
        tensors = {name: torch.from_numpy(array) for name, array in self._arrays().items()}
        write_tensors(folder / _ARRAYS, tensors)
        record = {"format": _FORMAT, "statistics": list(STATISTICS)}
        record |= {"sha256": tensors_sha256(tensors)}
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
        if tensors_sha256(tensors) != record["sha256"]:
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

"""What running steps say about the traffic: numbers of each generated token, layer by layer.

The code of the key that a step adds is copied at every step; all else is computed on a sampled
share of the steps, as scores and exact attention cost as much as the step itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hashattn.kernels import Codes, tokens_of
from hashattn.selectors.codes import CodeSelector
from hashattn.trust.drift.errors import DriftError
from hashattn.trust.drift.statistics import (
    KEY_SURPRISE,
    MARGIN,
    MISSED_MASS,
    QUERY_SURPRISE,
    RECALL,
    margin_at_threshold,
    recall_and_missed_mass,
    surprise,
)
from hashattn_kernels.codes import ByteMajor, Tiled, place

if TYPE_CHECKING:
    from hashattn.attention.attachment import Attachment
    from hashattn.attention.observer import LayerStep

_BEGINS = ("prefill", "no_cache")  # reasons of calls that begin a context: no steps
_MASK = (1 << 64) - 1
_BATCH = 1 << 20  # more rows than a batch has


def is_sampled(seed: int, number: int, share: float) -> bool:
    """Whether step `number` belongs to the sampled share: the same for the same seed, and as good
    as independent of its neighbours (SplitMix64's mixing; Steele, Lea and Flood 2014)."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95 & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return (mixed ^ mixed >> 31) < share * 2**64


@dataclass
class Readings:
    """Rows of some calls, in order: a row is a token that was computed, a query row of a sequence.

    sequences int64 (rows,): which sequence each belongs to, the same number for the same one.
    values: statistic -> layer -> float64 (rows,), NaN where there is none. keys, queries: layer ->
    which rows, and their codes uint8 (that many, heads, bytes).
    """

    rows: int
    sequences: np.ndarray
    values: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    keys: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    queries: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def add_surprise(self, tables: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Turn codes into the surprise statistics, by tables of `surprise_tables` by layer."""
        for name, codes in ((KEY_SURPRISE, self.keys), (QUERY_SURPRISE, self.queries)):
            for layer, (rows, coded) in codes.items():
                if layer in tables[name]:
                    values = np.full(self.rows, np.nan)
                    values[rows] = surprise(coded, tables[name][layer])
                    self.values.setdefault(name, {})[layer] = values


@dataclass
class _Call:
    """What is kept of one call of the model; tensors (batch, ..., q, ...) on its device.

    context: number of the batch of sequences. audited (q,): the sampled rows. real: which rows are
    not padding, None for all.
    """

    context: int
    audited: np.ndarray
    shape: tuple[int, int]
    real: Tensor | None
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)


class StepReader:
    """An observer of `Attachment.listen` that turns LayerSteps into Readings.

    run: whose steps it is told. share, seed: which rows are audited, see `is_sampled`. top: k of
    recall@k. every: rows after which `_take` gets their Readings. Subclasses define `_take`; it
    runs under the reader's lock, as threads may share a reader.

    Memory: codes of `every` rows and of one call for each thread, nothing that grows with the run.
    """

    timed = False

    def __init__(self, run: Attachment, share: float, seed: int, top: int, every: int) -> None:
        self._run, self._selector = run, run.selector
        self._share, self._seed, self._top = share, seed, top
        self._every = every
        self._codes = isinstance(self._selector, CodeSelector)
        self._numbers, self._contexts = count(), count()
        self._pending: list[_Call] = []
        self._rows = 0  # of these
        self._lock = threading.RLock()
        self._local = threading.local()
        self._rows_by_reason: Counter[tuple[int, str | None]] = Counter()

    def saw(self, step: LayerStep) -> None:
        """Told of every call of a layer by the attention path. DriftError after `run.swap`: what
        was calibrated for other hash weights says nothing of these."""
        if self._run.selector is not self._selector:
            raise DriftError(
                "the attachment's selector was swapped: stop listening with this monitor or "
                "calibrator, and calibrate a reference for the new one"
            )
        here = self._local
        if step.layer <= getattr(here, "layer", step.layer):
            self._end_call()
            here.number = next(self._numbers)
            begins = step.reason in _BEGINS and step.n == step.query.shape[2]
            if begins or not hasattr(here, "context"):
                here.context = next(self._contexts)
        here.layer = step.layer
        if step.reason in _BEGINS:
            return
        with self._lock:
            self._rows_by_reason[step.layer, step.reason] += step.rows
        if step.reason is not None:
            return
        if here.call is None:
            here.call = self._new_call(step, here.context, here.number)
        self._read(step, here.call)

    def _new_call(self, step: LayerStep, context: int, number: int) -> _Call:
        visible, q_len = step.view.visible, step.query.shape[2]
        real = None if visible is None else visible[:, -q_len:].clone()
        audited = np.array([
            is_sampled(self._seed, number + row * _BATCH, self._share) for row in range(q_len)
        ])  # fmt: skip
        return _Call(context, audited, (step.query.shape[0], q_len), real)

    def _read(self, step: LayerStep, call: _Call) -> None:
        layer = step.layer
        if self._codes:
            call.keys[layer] = _last(step.view.index["codes"], step.query.shape[2])
        if not call.audited.any():
            return
        if self._codes:
            codes = self._selector.encode_queries(layer, step.query, step.view)
            call.queries[layer] = _as_bytes(codes[..., 0] if codes.dim() == 5 else codes)
        margin = margin_at_threshold(step, self._selector)
        if margin is not None:
            call.values[MARGIN, layer] = margin
        recall, missed = recall_and_missed_mass(step, self._top)
        call.values[RECALL, layer], call.values[MISSED_MASS, layer] = recall, missed

    def _end_call(self) -> None:
        """Hand the finished call of this thread on."""
        call = getattr(self._local, "call", None)
        self._local.call = None
        if call is not None:
            with self._lock:
                self._pending.append(call)
                self._rows += call.shape[0] * call.shape[1]
                if self._rows >= self._every:
                    self._drain()

    def flush(self) -> None:
        """Take in what this thread's finished calls said; call it between calls of the model."""
        self._end_call()
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        calls, self._pending, self._rows = self._pending, [], 0
        if calls:
            self._take(_readings(calls))

    def _take(self, readings: Readings) -> None:
        raise NotImplementedError


def _last(codes: Codes | Tensor, tokens: int) -> Tensor:
    """A copy of the codes of the last tokens, uint8 (batch, heads, tokens, bytes)."""
    if isinstance(codes, ByteMajor):
        return codes.storage[..., -tokens:].transpose(2, 3).clone()
    if isinstance(codes, Tiled):
        n = codes.length
        tile, row, column = place(torch.arange(n - tokens, n, device=codes.storage.device))
        return _as_bytes(codes.storage[:, :, tile, :, row, column].permute(1, 2, 0, 3))
    return _as_bytes(tokens_of(codes)[:, :, -tokens:])


def _as_bytes(codes: Tensor) -> Tensor:
    """A copy of codes (..., words) int32 as uint8 (..., bytes)."""
    return codes.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _readings(calls: list[_Call]) -> Readings:
    """The real rows of calls; time runs along q first, then along the batch."""
    groups = [list(group) for _, group in groupby(calls, lambda call: call.shape[0])]
    parts = [_same_batch(group) for group in groups]
    first = np.cumsum([0, *(part.rows for part in parts)])
    if len(parts) == 1:
        return parts[0]
    joined = Readings(int(first[-1]), np.concatenate([part.sequences for part in parts]))
    for begin, part in zip(first, parts, strict=False):
        for name, by_layer in part.values.items():
            for layer, values in by_layer.items():
                of = joined.values.setdefault(name, {})
                whole = of.setdefault(layer, np.full(joined.rows, np.nan))
                whole[begin : begin + part.rows] = values
        for kind in ("keys", "queries"):
            of = getattr(joined, kind)
            for layer, (rows, codes) in getattr(part, kind).items():
                before = of.get(layer, (rows[:0], codes[:0]))
                of[layer] = tuple(
                    map(np.concatenate, zip(before, (rows + begin, codes), strict=True))
                )
    return joined


def _same_batch(calls: list[_Call]) -> Readings:
    """`_readings` of calls of the same number of sequences, which are joined along their rows."""
    batch = calls[0].shape[0]
    lengths = [call.shape[1] for call in calls]
    context = np.repeat([call.context for call in calls], lengths)
    sequences = (context[:, None] * _BATCH + np.arange(batch)).ravel()
    real = np.ones(len(sequences), bool)
    if any(call.real is not None for call in calls):
        real = np.concatenate([
            np.ones(batch * q_len, bool) if call.real is None else _by_row(call.real)
            for call, q_len in zip(calls, lengths, strict=True)
        ])  # fmt: skip
    audited = real & np.concatenate([np.repeat(call.audited, batch) for call in calls])
    number = np.cumsum(real) - 1
    ends = np.cumsum(lengths) * batch
    readings = Readings(int(real.sum()), sequences[real])
    for kind in ("keys", "queries", "values"):
        for key in dict.fromkeys(key for call in calls for key in getattr(call, kind)):
            having = [i for i, call in enumerate(calls) if key in getattr(call, kind)]
            tensors = [getattr(calls[i], kind)[key] for i in having]
            array = _by_row(torch.cat(tensors, dim=min(2, tensors[0].dim() - 1)))
            rows = np.concatenate(
                [np.arange(ends[i] - batch * lengths[i], ends[i]) for i in having]
            )
            kept = (real if kind == "keys" else audited)[rows]
            array, rows = array[kept], number[rows[kept]]
            if kind == "values":
                name, layer = key
                values = np.full(readings.rows, np.nan)
                values[rows] = array
                readings.values.setdefault(name, {})[layer] = values
            else:
                getattr(readings, kind)[key] = rows, array
    return readings


def _by_row(tensor: Tensor) -> np.ndarray:
    """(batch, q) -> (q * batch,); (batch, heads, q, bytes) -> (q * batch, heads, bytes)."""
    if tensor.dim() == 2:
        return tensor.T.flatten().cpu().numpy()
    return tensor.permute(2, 0, 1, 3).flatten(0, 1).cpu().numpy()


def all_codes(step: LayerStep) -> np.ndarray:
    """Codes uint8 (tokens, heads, bytes) of all keys that a step could read, without padding."""
    codes = _by_row(_as_bytes(tokens_of(step.view.index["codes"])))
    visible = step.view.visible
    return codes if visible is None else codes[_by_row(visible)]

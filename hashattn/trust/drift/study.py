"""How often the drift test alarms for nothing, and how soon it sees a shift: on your own traffic.

Steps are read once, through `attach` itself: a sequence's beginning is prefilled, and its last
tokens run as one sparse call of many rows, so that the same observer makes the numbers. Streams are
then drawn from these sequences. A sequence keeps its tokens in order, so whatever depends on each
other in traffic does so here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hashattn.base.checks import require, require_numbers
from hashattn.evaluation.benchmarks.texts import documents
from hashattn.trust.drift.monitor import DriftSettings, Watch
from hashattn.trust.drift.reading import Readings, StepReader, is_sampled
from hashattn.trust.drift.reference import DriftReference
from hashattn.trust.drift.statistics import KEY_SURPRISE, STATISTICS

if TYPE_CHECKING:
    from hashattn.attention.attachment import Attachment

_ROWS = 64  # of a stream that are tested together


def kind_sequences(
    tokenizer: Any, kind: str, length: int, count: int, split: str = "eval"
) -> list[Tensor]:
    """Token ids (length,) of `count` documents of a kind (evaluation.benchmarks.texts.KINDS)."""
    made = documents(tokenizer, kind, length, count, split)
    return [torch.tensor(tokenizer(text)["input_ids"][:length]) for text in made]


@torch.no_grad()
def run_rows(run: Attachment, ids: Tensor, rows: int) -> None:
    """One sequence ids (n,) through an attached model: all but the last `rows` tokens as a prompt,
    then these in one call, whose query rows are sparse and causal (attach(sparse_rows=rows)).

    ValueError for a sequence that is not longer than `rows`.
    """
    require(len(ids) > rows > 0, "rows", rows, f"in 1..{len(ids) - 1} for {len(ids)} tokens")
    ids = ids.to(run.model.device)[None]
    cache = run.model(ids[:, :-rows], use_cache=True, logits_to_keep=1).past_key_values
    run.model(ids[:, -rows:], past_key_values=cache, use_cache=True)


def read_sequences(
    run: Attachment, reference: DriftReference, sequences: Iterable[Tensor], rows: int
) -> list[np.ndarray]:
    """Standardised statistics (rows, statistics, layers + 1) of each sequence (see `run_rows`), all
    steps audited."""
    values = []
    for ids in sequences:
        reader = _KeepingReader(run, reference)
        with run.listen(reader):
            run_rows(run, ids, rows)
        reader.flush()
        values.append(np.concatenate(reader.kept))
    return values


class _KeepingReader(StepReader):
    def __init__(self, run: Attachment, reference: DriftReference) -> None:
        super().__init__(run, share=1.0, seed=0, top=reference.top, every=1)
        self._reference, self.kept = reference, []

    def _take(self, readings: Readings) -> None:
        self.kept.append(self._reference.standardised(self._reference.values(readings)))


def stream(
    pool: Sequence[np.ndarray], steps: int, rng: np.random.Generator, side_by_side: int = 1
) -> np.ndarray:
    """Statistics (steps, ...) of whole sequences drawn from the pool with replacement, so many of
    them served side by side, a token of each in turn; of several, the first begin at any token."""
    chains = []
    for _ in range(side_by_side):
        chain: list[np.ndarray] = []
        while sum(map(len, chain)) * side_by_side < steps:
            drawn = pool[rng.integers(len(pool))]
            begin = 0 if chain or side_by_side == 1 else rng.integers(len(drawn))
            chain.append(drawn[begin:])
        chains.append(np.concatenate(chain)[: -(-steps // side_by_side)])
    return np.stack(chains, 1).reshape(-1, *pool[0].shape[1:])[:steps]


def first_alarm(
    reference: DriftReference, settings: DriftSettings, values: np.ndarray
) -> tuple[int, str, int | None] | None:
    """(step, statistic, layer or None for all) of the first alarm of a stream of standardised
    statistics, of which those that are audited count on the reference's share of steps; None
    without one."""
    watch = Watch(reference, settings)
    values = values.copy()
    sampled = [is_sampled(settings.seed, step, reference.share) for step in range(len(values))]
    audited = [name != KEY_SURPRISE for name in STATISTICS]
    values[np.ix_(~np.array(sampled), audited)] = np.nan
    for begin in range(0, len(values), _ROWS):
        path = watch.update(values[begin : begin + _ROWS], begin)
        if (path >= 0).any():
            row, streams = next(
                (row, line >= 0) for row, line in enumerate(path) if (line >= 0).any()
            )
            statistic, place = watch.streams[streams.argmax()].tolist()
            layer = reference.layers[place] if place < len(reference.layers) else None
            return begin + row, STATISTICS[statistic], layer
    return None


def drift_study(
    reference: DriftReference,
    usual: Sequence[np.ndarray],
    shifted: dict[str, Sequence[np.ndarray]],
    settings: DriftSettings | None = None,
    *,
    steps: int = 10_000,
    seeds: int = 20,
    after: int = 500,
    follow: int = 1_000,
    side_by_side: int = 1,
) -> list[dict[str, Any]]:
    """A row for in-domain streams of `steps` tokens, and one for each shift after `after` of them.

    usual, shifted: statistics of sequences of `read_sequences`; those the reference was calibrated
    on must not be among them. Columns: stream; streams (one for each seed); alarms, how many had
    one: false ones in domain and before the shift in `early`, else within `follow` tokens; delay
    and slowest, median and 90 % quantile of the tokens from shift to alarm (inf: none); by, the
    statistics that raised them, most frequent first.
    """
    numbers = {"steps": steps, "seeds": seeds, "side_by_side": side_by_side}
    require_numbers(numbers, counts=dict.fromkeys(numbers, 1))
    settings = settings or DriftSettings()
    table = []
    for name, pool in {"usual": None, **shifted}.items():
        alarms = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, settings.seed])
            values = stream(usual, steps if pool is None else after, rng, side_by_side)
            if pool is not None:
                values = np.concatenate([values, stream(pool, follow, rng, side_by_side)])
            mine = replace(settings, seed=settings.seed + seed)
            alarms.append(first_alarm(reference, mine, values))
        table.append(_row(name, alarms, None if pool is None else after))
    return table


def _row(name: str, alarms: list[tuple | None], after: int | None) -> dict[str, Any]:
    rung = [alarm for alarm in alarms if alarm is not None]
    early = [] if after is None else [alarm for alarm in rung if alarm[0] < after]
    late = [alarm for alarm in rung if alarm not in early]
    names = [f"{s} {'all' if layer is None else layer}" for _, s, layer in late]
    row = {"stream": name, "streams": len(alarms), "alarms": len(late), "early": len(early)}
    by = sorted(set(names), key=lambda each: (-names.count(each), each))
    delays = [] if after is None else [alarm[0] - after + 1 for alarm in late]
    delays += [np.inf] * (len(alarms) - len(rung))
    quantiles = (
        (None, None)
        if after is None or not delays
        else (float(np.quantile(delays, share, method="higher")) for share in (0.5, 0.9))
    )
    return row | dict(zip(("delay", "slowest"), quantiles, strict=True)) | {"by": ", ".join(by)}

"""What a fallback would read on whole sequences, whose rows are levels of all layers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hashattn.attention.budget import Budget
from hashattn.attention.fallback import Fallback
from hashattn.base.checks import require
from hashattn.base.engines.processes import PROCESS_BYTES, spread
from hashattn.base.engines.threads import thread_count
from hashattn.hashing.capture import CapturedLayer
from hashattn.selectors.base import Selector
from hashattn.trust.fallback.levels import Levels, levels_of

_WORTH_PROCESSES = 0.5  # seconds a sequence; shorter ones are read before processes have started


@dataclass
class Rows:
    """Levels of all layers for the rows of several sequences, in the same order in each layer.

    owner: the sequence of each row, 0, 1, ... .
    """

    parts: dict[int, list[Levels]] = field(default_factory=dict)
    owner: list[int] = field(default_factory=list)

    def add(self, levels: dict[int, Levels], sequence: int) -> None:
        """Add a sequence. ValueError if layers or rows differ."""
        rows = {part.errors.shape[1] for part in levels.values()}
        same = len(rows) == 1 and (not self.parts or set(self.parts) == set(levels))
        require(same, "captured", f"layers {sorted(levels)} with {sorted(rows)} rows",
                "the same layers in every sequence, all with the same rows")  # fmt: skip
        for layer, part in levels.items():
            self.parts.setdefault(layer, []).append(part)
        self.owner += [sequence] * rows.pop()

    def joined(self) -> dict[int, Levels]:
        """By layer."""
        return {layer: Levels.joined(parts) for layer, parts in self.parts.items()}


@torch.no_grad()
def read_sequences(
    captured: Iterable[list[CapturedLayer]], selector: Selector, budget: Budget, top: int,
    rules: Sequence[Fallback | None] = (None,),
) -> list[Rows]:  # fmt: skip
    """For each rule the rows of all sequences, from where it begins; all levels for None.

    captured: the layers of one sequence after the other. Where a sequence takes long on a CPU, all
    but the first are read by processes, one for each core, which hold one each.
    """
    read, sequences = _Read(selector, budget, top, tuple(rules)), enumerate(captured)
    first = next(sequences, None)
    if first is None:
        return [Rows() for _ in rules]
    start = time.perf_counter()
    found = dict(read([first]))
    if time.perf_counter() - start < _WORTH_PROCESSES:
        found |= dict(read(sequences))
    else:
        device = first[1][0].keys.device
        engine = spread(torch.get_num_threads(), PROCESS_BYTES, device)
        with thread_count(1 if device.type == "cpu" else torch.get_num_threads()):
            found |= dict(engine.run(read, ([sequence] for sequence in sequences)))
    tables = [Rows() for _ in rules]
    for number in sorted(found):
        for table, levels in zip(tables, found[number], strict=True):
            table.add(levels, number)
    return tables


@dataclass(frozen=True)
class _Read:
    """Levels by layer of sequences for each rule; picklable, for other processes."""

    selector: Selector
    budget: Budget
    top: int
    rules: tuple[Fallback | None, ...]

    @torch.no_grad()
    def __call__(
        self, sequences: Iterable[tuple[int, list[CapturedLayer]]]
    ) -> Iterator[tuple[int, list[dict[int, Levels]]]]:
        for number, layers in sequences:
            yield number, [self._levels(layers, rule) for rule in self.rules]

    def _levels(self, layers: list[CapturedLayer], rule: Fallback | None) -> dict[int, Levels]:
        found = {}
        for layer in layers:
            lists = self.selector.lists(len(layer.queries), len(layer.keys))
            start = torch.zeros(lists).long() if rule is None else rule.start[layer.layer]
            found[layer.layer] = levels_of(layer, self.selector, self.budget, self.top, start)
        return found

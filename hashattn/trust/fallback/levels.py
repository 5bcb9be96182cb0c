"""What captured rows would read, predict and miss at every level of a fallback.

Rows are read by the class that reads them at run time, so that what is calibrated is what runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hashattn.attention.budget import Budget
from hashattn.attention.fallback import Fallback
from hashattn.attention.fallback_reading import Reading, gather_rows, reading_of
from hashattn.attention.masks import spans_plan
from hashattn.base.checks import require
from hashattn.hashing.capture import CapturedLayer
from hashattn.kernels import attend
from hashattn.selectors.base import KeyView, Selector

_ROWS = 16  # read at once: bounds what a dense level gathers


def captured_readings(
    layer: CapturedLayer, selector: Selector, budget: Budget, top: int, start: Tensor
) -> Iterable[Reading]:
    """Readings of the captured rows of a layer, in order, some at a time; ValueError for a layer
    without values."""
    require(layer.values is not None, "captured", "layers without values", "captured with values")
    index = selector.index_of(layer.layer, layer.keys, layer.values)
    keys, values = layer.keys[None], layer.values[None]
    heads, kv_heads = len(layer.queries), len(layer.keys)
    logits = {"scaling": layer.scaling, "softcap": layer.softcap, "sinks": None}
    for rows in torch.arange(len(layer.positions)).split(_ROWS):
        positions, query = layer.positions[rows], layer.queries[None, :, rows]
        ends = positions.to(keys.device) + 1
        spans = torch.stack((torch.zeros_like(ends), ends), dim=-1)[None]
        plan = budget.of_layer(
            spans_plan(spans, keys.shape[2], budget), layer.layer, kv_heads,
            selector.lists(heads, kv_heads),
        )  # fmt: skip
        view = KeyView(keys, index, positions=positions)

        def sample(plan, query=query, view=view):
            return selector.sample(layer.layer, query, view, layer.scaling, plan)

        read = partial(attend, query, keys, values)
        rows = partial(gather_rows, keys, values)
        yield reading_of(sample, read, query, rows, plan, logits, top, start.to(keys.device))


@dataclass(frozen=True)
class Levels:
    """Rows of one layer, of any sequences, at each level below dense.

    statistics (heads, rows, levels, 2): as of `Reading`; errors (heads, rows, levels): relative L2
    error of the output against the dense level's; NaN for levels that a row does not come to, as
    they lie below the start or read everything. density (lists, rows, levels + 1): tokens read of
    those seen, 1 at the last, which is dense.
    """

    statistics: Tensor
    errors: Tensor
    density: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Levels]) -> Levels:
        """The rows of all parts."""
        names = ("statistics", "errors", "density")
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))

    def ended(self, fallback: Fallback, layer: int) -> Tensor:
        """The level (lists, rows) at which each list ends by a fallback."""
        lists, rows, levels = self.density.shape
        top = levels - 1
        ended = torch.full((lists, rows), top)
        for level in reversed(range(top)):
            at = torch.full((1, lists, rows), level)
            more = fallback.exceeds(layer, self.statistics[None, :, :, level], at)[0]
            ended = torch.where(more, ended, level)
        return ended

    def needed(self, tolerance: float) -> Tensor:
        """The lowest level (lists, rows) at which no head of a list is off by more: what a policy
        that knows the truth reads."""
        lists, rows, levels = self.density.shape
        fine = (self.errors <= tolerance).unflatten(0, (lists, -1)).all(dim=1)
        fine = torch.cat((fine, torch.ones(lists, rows, 1, dtype=torch.bool)), dim=-1)
        return fine.int().argmax(dim=-1)

    def at(self, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (heads, rows) and density (lists, rows) of lists at levels (lists, rows)."""
        errors = torch.cat((self.errors, torch.zeros_like(self.errors[..., :1])), dim=-1)
        group = len(errors) // len(ended)
        of_heads = ended.repeat_interleave(group, dim=0)
        return (
            errors.gather(-1, of_heads[..., None])[..., 0],
            self.density.gather(-1, ended[..., None])[..., 0],
        )

    @property
    def worst(self) -> Levels:
        """With the largest error of each level and those above, so that reading more never counts
        as worse."""
        errors = self.errors.nan_to_num(0).flip(-1).cummax(dim=-1).values.flip(-1)
        return replace(self, errors=errors)


@torch.no_grad()
def levels_of(
    layer: CapturedLayer, selector: Selector, budget: Budget, top: int, start: Tensor
) -> Levels:
    """Levels of all captured rows of a layer, read from `start` (lists,) up to dense."""
    readings = captured_readings(layer, selector, budget, top, start)
    return Levels.joined([_read_up(reading, top) for reading in readings])


def _read_up(reading: Reading, top: int) -> Levels:
    passes = []
    while True:
        read = (reading.indices >= 0).sum(-1)
        new = reading.new & ~reading.dense
        parts = (reading.levels, new, reading.statistics, reading.out.float(), read)
        passes.append([part.cpu() for part in parts])
        if reading.dense.all():
            break
        reading.double(~reading.dense)
    dense, seen = passes[-1][3:]
    heads, lists, rows = dense.shape[1], seen.shape[1], seen.shape[2]
    statistics = torch.full((heads, rows, top, 2), torch.nan)
    errors = torch.full((heads, rows, top), torch.nan)
    density = torch.full((lists, rows, top + 1), torch.nan)
    density[..., top] = 1
    for levels, new, values, out, read in passes:
        error = (out - dense).norm(dim=-1) / dense.norm(dim=-1)
        entry, row = new[0].nonzero(as_tuple=True)
        density[entry, row, levels[0, entry, row]] = (read / seen)[0, entry, row]
        group = heads // lists
        levels, new = (part[0].repeat_interleave(group, dim=0) for part in (levels, new))
        head, row = new.nonzero(as_tuple=True)
        at = levels[head, row]
        statistics[head, row, at] = values[0, head, row].float()
        errors[head, row, at] = error[0, head, row]
    return Levels(statistics, errors, density)

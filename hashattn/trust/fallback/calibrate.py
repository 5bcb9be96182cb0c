"""Conformal risk control of the verified fallback.

Some sequences fit the predictions: ridge regression of log(error) on the logs of what a reading
finds (hashattn.attention.fallback_reading), for each layer, query head and level, and the level
each list begins with. The others calibrate: of n of
them, with l_i(f) the share of sequence i's head-steps above the tolerance when predictions are
multiplied by f, the smallest f with n / (n + 1) mean(l_i(f)) + 1 / (n + 1) <= risk keeps the
expected share of a new sequence, exchangeable with these, at most at the risk (Angelopoulos, Bates,
Fisch, Lei and Schuster 2022, theorem 1). It asks that l_i never rises with f: an error counts here
as the largest of its level and those above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hashattn.attention.budget import Budget
from hashattn.attention.fallback import TERMS, Fallback, check_grows, fallback_fingerprint
from hashattn.base.checks import is_number, require, require_numbers
from hashattn.hashing.capture import CapturedLayer
from hashattn.models.structure import attention_modules
from hashattn.selectors.base import Selector
from hashattn.trust.fallback.levels import Levels
from hashattn.trust.fallback.sequences import Rows, read_sequences

_RIDGE = 0.1
_LEAST_ERROR = 1e-6  # counts as this, as its logarithm is fitted
_FACTORS = torch.linspace(-7, 7, 1401, dtype=torch.float64).exp().tolist()


def sequences_needed(risk: float) -> int:
    """The fewest calibration sequences with which a risk can be promised: 1 / (n + 1) <= risk."""
    return math.ceil(1 / risk - 1 - 1e-9)


def calibrate_fallback(
    captured: Iterable[Iterable[CapturedLayer]], selector: Selector, budget: Budget, *,
    model: PreTrainedModel, tolerance: float, risk: float = 0.05, fitting: int = 40,
    levels: int = 6, begin: float = 0.7,
) -> Fallback:  # fmt: skip
    """A Fallback for one tolerance, see `calibrate_fallbacks`."""
    made = calibrate_fallbacks(
        captured, selector, budget, model=model, tolerances=[tolerance], risk=risk,
        fitting=fitting, levels=levels, begin=begin,
    )  # fmt: skip
    return made[tolerance]


@torch.no_grad()
def calibrate_fallbacks(
    captured: Iterable[Iterable[CapturedLayer]], selector: Selector, budget: Budget, *,
    model: PreTrainedModel, tolerances: Sequence[float], risk: float = 0.05, fitting: int = 40,
    levels: int = 6, begin: float = 0.7,
) -> dict[float, Fallback]:  # fmt: skip
    """{tolerance: Fallback} of a method and the budget that its lists begin with.

    captured: the layers of one sequence after the other (`hashing.capture`, with values), at rows
    like those that will be decoded; each process holds one sequence at a time. The first `fitting`
    of them fit predictions, all others calibrate. levels: how often a list may double before it is
    dense. begin: a list begins at the highest level that at least this share of its steps needs;
    towards 1 fewer tokens are read, in more passes.

    ValueError for a risk that the number of sequences cannot give, saying how many it needs, for a
    tolerance that no factor keeps, layers without values, models with learned softmax sinks, and
    methods and budgets without a fallback.
    """
    check_grows(selector, budget)
    if any(getattr(module, "sinks", None) is not None for module in attention_modules(model)):
        raise ValueError(
            "model: its softmax has learned sinks, which captures do not hold, so no fallback can "
            "be calibrated for it"
        )
    numbers = {"fitting": fitting, "levels": levels, "begin": begin}
    require_numbers(numbers, counts={"fitting": 1, "levels": 1}, shares=["begin"])
    for name, value in [("risk", risk), *(("tolerance", each) for each in tolerances)]:
        valid = is_number(value) and 0 < value < 1
        require(valid, name, value, "a number between 0 and 1")
    if hasattr(captured, "__len__"):
        _require_enough(len(captured) - fitting, risk, fitting)
    lengths: list[int] = []
    sequences = _with_lengths(captured, lengths)
    (fitted,) = read_sequences(islice(sequences, fitting), selector, budget, levels)
    if len(lengths) < fitting:
        _require_enough(0, risk, fitting)
    fingerprint = fallback_fingerprint(model, selector, budget)
    rules = _fitted(fitted, tolerances, risk, begin, fingerprint)
    calibrated = read_sequences(sequences, selector, budget, levels, tuple(rules.values()))
    count = len(lengths) - fitting
    _require_enough(count, risk, fitting)
    return {
        tolerance: _controlled(rule, rows, count, lengths, fitting)
        for (tolerance, rule), rows in zip(rules.items(), calibrated, strict=True)
    }


def _with_lengths(
    captured: Iterable[Iterable[CapturedLayer]], lengths: list[int]
) -> Iterator[list[CapturedLayer]]:
    """The sequences as lists; adds the tokens of each to `lengths`."""
    for sequence in captured:
        layers = list(sequence)
        require(bool(layers), "captured", "a sequence without layers", "one with captured layers")
        lengths.append(max(layer.keys.shape[1] for layer in layers))
        yield layers


def _require_enough(count: int, risk: float, fitting: int) -> None:
    needed = sequences_needed(risk)
    if count < needed:
        raise ValueError(
            f"risk = {risk}: needs at least {needed} calibration sequences beside the {fitting} "
            f"that fit predictions, got {max(count, 0)}: capture more, or accept a larger risk"
        )


def _fitted(
    fitted: Rows, tolerances: Sequence[float], risk: float, begin: float, fingerprint: dict
) -> dict[float, Fallback]:
    """Rules with coefficients and starts, and the factor that the fitting sequences would have."""
    tables = fitted.joined()
    coefficients = {layer: _regression(table) for layer, table in tables.items()}
    rules = {}
    for tolerance in tolerances:
        zeros = {n: torch.zeros(len(t.density)).long() for n, t in tables.items()}
        rule = Fallback(tolerance, risk, coefficients, zeros, 1.0, fingerprint, {})
        factor = _smallest(rule, tables, fitted.owner, risk)
        rule = replace(rule, factor=_FACTORS[-1] if factor is None else factor)
        ended = {layer: table.ended(rule, layer) for layer, table in tables.items()}
        start = {layer: _quantile(levels, 1 - begin) for layer, levels in ended.items()}
        rules[tolerance] = replace(rule, start=start)
    return rules


def _regression(table: Levels) -> Tensor:
    """Coefficients float32 (heads, levels, 3)."""
    heads, _, levels = table.errors.shape
    found = torch.zeros(heads, levels, TERMS)
    for head in range(heads):
        for level in range(levels):
            terms, errors = table.statistics[head, :, level], table.errors[head, :, level]
            known = ~(terms.isnan().any(-1) | errors.isnan())
            terms, errors = terms[known].double(), errors[known].double()
            terms = torch.cat((torch.ones(len(terms), 1, dtype=torch.float64), terms), dim=1)
            target = errors.clamp(min=_LEAST_ERROR).log()
            normal = terms.mT @ terms + _RIDGE * torch.eye(TERMS, dtype=torch.float64)
            found[head, level] = torch.linalg.solve(normal, terms.mT @ target).float()
    return found


def _quantile(levels: Tensor, share: float) -> Tensor:
    """Of levels (lists, rows) the lower quantile by list, int64."""
    place = int(share * (levels.shape[1] - 1))
    return levels.sort(dim=1).values[:, place]


def losses(rule: Fallback, tables: dict[int, Levels], owner: Sequence[int]) -> Tensor:
    """Share of each sequence's head-steps whose error is above the rule's tolerance, float64."""
    wrong = torch.zeros(len(owner), dtype=torch.float64)
    steps = 0
    for layer, table in tables.items():
        errors, _ = table.at(table.ended(rule, layer))
        wrong += (errors > rule.tolerance).double().sum(0)
        steps += len(errors)
    owners = torch.tensor(owner)
    count = int(owners.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, owners, wrong)
    return sums / (steps * owners.bincount(minlength=count))


def _smallest(
    rule: Fallback, tables: dict[int, Levels], owner: Sequence[int], allowed: float
) -> float | None:
    """The smallest factor with a mean loss of at most `allowed`; None if none has."""
    worst = {layer: table.worst for layer, table in tables.items()}
    low, high = 0, len(_FACTORS)
    while low < high:
        middle = (low + high) // 2
        tried = replace(rule, factor=_FACTORS[middle])
        if float(losses(tried, worst, owner).mean()) <= allowed:
            high = middle
        else:
            low = middle + 1
    return None if low == len(_FACTORS) else _FACTORS[low]


def _controlled(
    rule: Fallback, rows: Rows, count: int, lengths: list[int], fitting: int
) -> Fallback:
    """The rule with the factor that `count` calibration sequences give it."""
    tables = rows.joined()
    factor = _smallest(rule, tables, rows.owner, rule.risk - (1 - rule.risk) / count)
    if factor is None:
        raise ValueError(
            f"tolerance = {rule.tolerance}: predictions are too poor to keep the risk {rule.risk}, "
            "other than by dense attention: accept a larger tolerance, or fit on more sequences"
        )
    heads = sum(len(table.errors) for table in tables.values())
    record = {
        "sequences": count, "fitting_sequences": fitting, "head_steps": heads * len(rows.owner),
        "shortest": min(lengths), "longest": max(lengths),
    }  # fmt: skip
    return replace(rule, factor=factor, calibrated=record)

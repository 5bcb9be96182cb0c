"""Notebook 05: verified fallback beside the policy that knows the truth and a fixed budget.

python -m hashattn.reproduce.experiments.fallback --profile smollm2 --weights 64_bits writes a
profile's table of both ways of reading.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch

from hashattn.attention.budget import Budget
from hashattn.attention.fallback import Fallback
from hashattn.evaluation.statistics import wilson
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.reproduce.experiments.common import QUESTIONS_PER_CONTEXT, sequences
from hashattn.reproduce.experiments.own_run import run
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector
from hashattn.trust.fallback.calibrate import calibrate_fallbacks
from hashattn.trust.fallback.levels import Levels
from hashattn.trust.fallback.sequences import read_sequences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "05_fallback_readings"
INDEX = ["tokens", "reading", "tolerance", "policy"]
_READINGS = {"ranked": 0.0, "half drawn": 0.5}
FALLBACK, TRUTH, FIXED = "fallback", "knows the truth", "fixed budget"
_COLORS = {FALLBACK: "#0072b2", TRUTH: "#009e73", FIXED: "#999999"}
_SEED = 5000  # of generated tasks, which no other experiment draws


@dataclass(frozen=True)
class FallbackScale:
    """How much is calibrated and tested.

    length: tokens of every sequence. fitting, calibration, tested: numbers of sequences, disjoint;
    rows: decode steps of each, from its second half. sampled: of the budget. The rest as of
    `calibrate_fallbacks`.
    """

    length: int = 2048
    fitting: int = 40
    calibration: int = 60
    tested: int = 60
    rows: int = 16
    density: float = 1 / 32
    sampled: float = 0.0
    tolerances: tuple[float, ...] = (0.1, 0.2)
    risk: float = 0.05
    levels: int = 6
    begin: float = 0.7


BRIEF = FallbackScale(fitting=12, calibration=48, tested=28, rows=24)  # a notebook's
_LEAST = FallbackScale(length=512, fitting=4, calibration=20, tested=2, rows=4)


def scale_of(profile: Profile) -> FallbackScale:
    """BRIEF, or the fewest sequences that give a risk of 5 % where a profile trains on few."""
    return BRIEF if profile.training.sequences >= 8 else _LEAST


@torch.no_grad()
def fallbacks(
    profile: Profile, model, tokenizer, selector: Selector, scale: FallbackScale | None = None
) -> tuple[dict[float, Fallback], pd.DataFrame]:
    """{tolerance: Fallback}, and what they and other policies do on sequences they have not seen.

    Columns: tolerance; policy, the fallback, the lowest level that keeps the tolerance by the true
    errors, or a fixed budget with the fallback's mean density; head_steps; violations, the share of
    them with an output error above the tolerance, low and high its 95 % interval (`wilson`);
    density, mean over lists and rows; ratio, to the policy that knows the truth; dense, share of
    lists that read everything; passes, reads of a list; error, mean output error.
    """
    scale = scale or FallbackScale()
    budget = Budget(profile.sink, profile.local, density=scale.density, sampled=scale.sampled)
    count = scale.fitting + scale.calibration
    rules = calibrate_fallbacks(
        _captured(profile, model, tokenizer, scale, count, _SEED), selector, budget, model=model,
        tolerances=scale.tolerances, risk=scale.risk, fitting=scale.fitting, levels=scale.levels,
        begin=scale.begin,
    )  # fmt: skip
    tested = list(_captured(profile, model, tokenizer, scale, scale.tested, _SEED + count))
    every = _tables(tested, selector, budget, scale.levels)
    lines = []
    for tolerance, rule in rules.items():
        tables = _tables(tested, selector, budget, scale.levels, rule)
        ended = {layer: table.ended(rule, layer) for layer, table in tables.items()}
        passes = [(ended[layer] - rule.start[layer][:, None] + 1).flatten() for layer in tables]
        truth = {layer: table.needed(tolerance) for layer, table in every.items()}
        found = _line(FALLBACK, tolerance, tables, ended, scale.levels)
        found |= {"passes": float(torch.cat(passes).float().mean())}
        same = replace(budget, density=found["density"])
        fixed = _tables(tested, selector, same, 1)
        zeros = {layer: torch.zeros_like(levels) for layer, levels in ended.items()}
        lines += [
            found,
            _line(TRUTH, tolerance, every, truth, scale.levels),
            _line(FIXED, tolerance, fixed, zeros, 1),
        ]
    frame = pd.DataFrame(lines)
    best = frame[frame.policy == TRUTH].set_index("tolerance").density
    frame["ratio"] = frame.density / frame.tolerance.map(best)
    return rules, frame


def readings(
    profile: Profile, model, tokenizer, selector: Selector, lengths: Iterable[int] = (),
    scale: FallbackScale | None = None,
) -> pd.DataFrame:  # fmt: skip
    """`fallbacks` of lists that are ranked and of lists of which half is drawn, a line by INDEX, at
    the scale's length or at these."""
    scale = scale or replace(BRIEF, rows=FallbackScale.rows)
    parts = {}
    for tokens in lengths or [scale.length]:
        for reading, share in _READINGS.items():
            own = replace(scale, length=tokens, sampled=share)
            frame = fallbacks(profile, model, tokenizer, selector, own)[1]
            parts[tokens, reading] = frame.set_index(INDEX[2:])
    return pd.concat(parts, names=INDEX[:2])


def _captured(
    profile: Profile, model, tokenizer, scale: FallbackScale, count: int, seed: int
) -> Iterator[list[CapturedLayer]]:
    """Layers of `count` sequences of generated tasks, one sequence at a time."""
    tokens = sequences(profile, tokenizer, count, length=scale.length, split="eval", seed=seed,
                       questions=QUESTIONS_PER_CONTEXT)  # fmt: skip
    for ids, positions in tokens:
        rows = torch.as_tensor(positions).sort().values
        rows = rows[rows >= len(ids) // 2]
        rows = rows[torch.linspace(0, len(rows) - 1, min(scale.rows, len(rows))).long()]
        yield list(capture(model, ids, rows=rows, values=True).values())


def _tables(
    tested: list[list[CapturedLayer]], selector: Selector, budget: Budget, levels: int,
    rule: Fallback | None = None,
) -> dict[int, Levels]:  # fmt: skip
    (rows,) = read_sequences(tested, selector, budget, levels, [rule])
    return rows.joined()


def _line(
    policy: str, tolerance: float, tables: dict[int, Levels], ended: dict[int, torch.Tensor],
    top: int,
) -> dict:  # fmt: skip
    parts = [table.at(ended[layer]) for layer, table in tables.items()]
    errors, density = (torch.cat([part[i].flatten() for part in parts]) for i in (0, 1))
    wrong = int((errors > tolerance).sum())
    low, high = wilson(wrong, len(errors))
    dense = torch.cat([levels.flatten() for levels in ended.values()]) == top
    return {
        "tolerance": tolerance, "policy": policy, "head_steps": len(errors),
        "violations": wrong / len(errors), "low": low, "high": high,
        "density": float(density.mean()), "dense": float(dense.float().mean()),
        "error": float(errors.mean()),
    }  # fmt: skip


def fallback_claims(claims: Claims, frame: pd.DataFrame, risk: float) -> None:
    """Of each tolerance in a frame of `fallbacks`: the risk kept, and what that reads."""
    for tolerance, part in frame.groupby("tolerance"):
        by, name = part.set_index("policy"), f"fallback, {100 * tolerance:g} % output error"
        claims.goal(f"{name}: head-steps above it (share)", by["violations"][FALLBACK], high=risk)
        claims.goal(f"{name}: density over the truth-knowing policy's", by["ratio"][FALLBACK],
                    high=1.2)  # fmt: skip
        fewer = by["violations"][FALLBACK] / max(by["violations"][FIXED], 1e-9)
        claims.goal(f"{name}: violations over a fixed budget's", fewer, high=1.0)


def draw_fallbacks(frame: pd.DataFrame, risk: float) -> Figure:
    """Violations with their intervals, and density, against the tolerance, of a frame of
    `fallbacks`; the line of the risk."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for policy, part in frame.groupby("policy", sort=False):
        x, color = 100 * part.tolerance, _COLORS[policy]
        spread = 100 * abs(part[["low", "high"]].to_numpy().T - part.violations.to_numpy())
        left.errorbar(x, 100 * part.violations, spread, marker="o", capsize=3,
                      label=policy, color=color)  # fmt: skip
        if policy != FIXED:
            right.plot(x, part.density, marker="o", label=policy, color=color)
    left.axhline(100 * risk, color="black", linestyle="--", linewidth=1, label="risk")
    left.set_ylabel("head-steps above the tolerance (%)")
    right.set_ylabel("density")
    for axis in (left, right):
        axis.set_xlabel("tolerance: output error (%)")
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, readings))

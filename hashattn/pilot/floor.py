"""The floor: can dense attention be told from guessing? Where it cannot, nothing is said of sparse
attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hashattn.evaluation.metrics import first_line, holds_answer
from hashattn.evaluation.statistics import Difference, paired_bootstrap
from hashattn.pilot.plan import Asked

LEAST = 5  # samples: with fewer an interval means nothing


@dataclass(frozen=True)
class Floor:
    """Dense attention beside a guess: difference of their means with the ends of its interval, in
    favour of dense. clear: there are samples enough, and the interval leaves out zero."""

    dense: float
    guess: float
    difference: float
    low: float
    high: float
    count: int
    clear: bool


def text_floor(rows: pd.DataFrame, read_bytes: Sequence[int], packed: Sequence[float]) -> Floor:
    """Bits a byte of dense attention (rows of fidelity, one a context) beside a file compressor's
    (`packed`); read_bytes: of the tokens that are predicted, all that are read but the first."""
    bits = rows["dense_nll"] * (rows["positions"] - 1) / math.log(2)
    model = bits / np.maximum(1, read_bytes)
    return _floor(model, packed, paired_bootstrap(packed, model))


def answer_floor(
    asked: Sequence[Asked], dense: pd.DataFrame, guesses: pd.DataFrame, numbers: Sequence[int]
) -> Floor:
    """Shares of right answers to the questions `numbers`, whose answers are known; dense, guesses:
    a line for each of `asked`. A guess is right as often as the better of two: the model asked
    without documents, and its answers to the other questions."""
    scores = dense["score"].to_numpy()[numbers]
    own = [asked[number] for number in numbers]
    swapped = _swapped(own, dense["prediction"].iloc[numbers])
    guess = np.maximum(guesses["score"].to_numpy()[numbers], swapped)
    return _floor(scores, guess, difference(scores, guess, own))


def difference(a: Sequence[float], b: Sequence[float], asked: Sequence[Asked]) -> Difference:
    """mean(a) - mean(b) with its interval over contexts, whose questions are not independent; over
    questions where there are fewer contexts than LEAST, and then for these contexts alone."""
    groups = [each.context.text for each in asked]
    return paired_bootstrap(a, b, groups=groups if len(set(groups)) >= LEAST else None)


def languages(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Numbers of the questions whose answers are known, by language."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(asked):
        if each.answers:
            groups.setdefault(each.record.language, []).append(number)
    return groups


def _swapped(asked: Sequence[Asked], predictions: Sequence[str]) -> np.ndarray:
    """For each question, how often an answer to another one would have been right."""
    lines = [first_line(text) for text in predictions]
    hits = np.array([[holds_answer(line, own.answers) for line in lines] for own in asked])
    return (hits.sum(1) - hits.diagonal()) / max(1, len(lines) - 1)


def _floor(dense: Sequence[float], guess: Sequence[float], found: Difference) -> Floor:
    clear = len(dense) >= LEAST and found.low > 0
    return Floor(
        float(np.mean(dense)), float(np.mean(guess)), found.difference, found.low, found.high,
        len(dense), clear,
    )  # fmt: skip

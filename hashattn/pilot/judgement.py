"""What the measurements say: can the model do the task at all, is quality kept, at which budget.

The floor decides. Where dense attention's score cannot be told from guessing, nothing is said of
sparse attention on that measure but "cannot be judged"; and the recommendation is that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hashattn.evaluation.statistics import Difference, paired_bootstrap
from hashattn.pilot.measurements import Measured
from hashattn.pilot.plan import QUESTIONS, QUOTES, Plan
from hashattn.pilot.settings import PilotSettings

KEPT, LOST, OPEN, UNJUDGED = "kept", "lost", "open", "cannot_be_judged"
GO, FALLBACK, NO_GO = "go", "go_with_fallback", "no_go"
_LEAST = 5  # samples: with fewer an interval means nothing
_FARTHEST = 100  # times as many samples as there are, beyond which no number is given


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


@dataclass(frozen=True)
class Answers:
    """Right answers at a budget beside dense attention's, in shares; sparse minus dense with its
    interval over contexts. same: share of answers that are dense attention's to the letter. more:
    samples in all that a firm verdict needs, None where it is firm or cannot be told."""

    dense: float | None
    sparse: float | None
    difference: float | None
    low: float | None
    high: float | None
    count: int
    same: float
    verdict: str
    more: int | None = None


@dataclass(frozen=True)
class Closeness:
    """Fidelity at a budget (evaluation.fidelity): means over contexts, and a verdict on kl."""

    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    perplexity_ratio: float
    same_tokens: float
    new_tokens: int
    documents: int
    verdict: str
    more: int | None = None


@dataclass(frozen=True)
class Quality:
    """One budget: density as counted, and what was measured at it (None: it was not)."""

    budget: float
    density: float
    questions: Answers | None
    quotes: Answers | None
    fidelity: Closeness

    @property
    def judged(self) -> list[tuple[str, Answers | Closeness]]:
        """What there is of questions, quotes and fidelity."""
        named = (
            ("questions", self.questions),
            ("quotes", self.quotes),
            ("fidelity", self.fidelity),
        )
        return [(name, part) for name, part in named if part is not None]


@dataclass(frozen=True)
class Reason:
    """A key of the report's sentences, and the values that stand in it."""

    key: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """floors by measure (questions, quotes, text; None where not measured), quality by budget, and
    the recommendation: verdict, budget (None: none) and reasons, the weightiest first."""

    floors: dict[str, Floor | None]
    quality: tuple[Quality, ...]
    verdict: str
    budget: float | None
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report's `floors`, `quality` and `recommendation`."""
        return {
            "floors": {n: floor and asdict(floor) for n, floor in self.floors.items()},
            "quality": [asdict(quality) for quality in self.quality],
            "recommendation": {
                "verdict": self.verdict, "budget": self.budget,
                "reasons": [asdict(reason) for reason in self.reasons],
            },
        }  # fmt: skip


def judge(
    measured: Measured, plan: Plan, settings: PilotSettings, preflight: Any,
    embedded: bool = False,
) -> Judgement:  # fmt: skip
    """What is to be recommended, from measurements and pre-flight (capacity.Preflight).

    No go: pre-flight says that there is nothing to gain, or every budget loses more than tolerated.
    Cannot be judged: the text is predicted no better than a file compressor does, dense attention's
    answers cannot be told from guesses, or the model is the embedded one. Go: at the smallest
    budget at which all that was measured is kept; with fallback where what is missing is certainty.
    """
    floors = {"questions": None, "quotes": None, "text": _text_floor(measured)}
    name = QUESTIONS if plan.asked else QUOTES
    known, left_out = _told_from_guessing(measured)
    if known:
        floors[name] = _answer_floor(measured, known)
    quality = tuple(_quality(measured, settings, d, name, floors, known) for d in settings.budgets)
    verdict, budget, reasons = _recommend(floors, quality, preflight, embedded)
    return Judgement(floors, quality, verdict, budget, (*reasons, *left_out, *_remarks(plan)))


def _told_from_guessing(measured: Measured) -> tuple[list[int], list[Reason]]:
    """Numbers of the questions that answers are judged on: those whose answers are known, without
    those in a language in which dense attention cannot be told from guessing, if it can in another;
    and a remark on each language left out."""
    known = [number for number, each in enumerate(measured.asked) if each.answers]
    groups: dict[str, list[int]] = {}
    for number in known:
        groups.setdefault(measured.asked[number].record.language, []).append(number)
    floors = {language: _answer_floor(measured, own) for language, own in groups.items()}
    if not any(floor.clear for floor in floors.values()):
        return known, []
    kept = sorted(n for language, own in groups.items() if floors[language].clear for n in own)
    return kept, [
        Reason("language_left_out", {"language": language, "count": floor.count,
                                     "dense": floor.dense, "guess": floor.guess})
        for language, floor in floors.items()
        if not floor.clear
    ]  # fmt: skip


def _text_floor(measured: Measured) -> Floor:
    rows = measured.rows(measured.fidelity, None)
    bits = rows["dense_nll"] * (rows["positions"] - 1) / math.log(2)
    model = bits / np.maximum(1, measured.read_bytes)
    return _floor(model, measured.packed, paired_bootstrap(measured.packed, model))


def _answer_floor(measured: Measured, known: Sequence[int]) -> Floor:
    """Of the questions `known`, whose answers are."""
    dense = measured.rows(measured.answers, None)
    scores = dense["score"].to_numpy()[known]
    guesses = np.maximum(measured.rows(measured.guesses, None)["score"].to_numpy()[known],
                         _swapped(measured, known, dense["prediction"]))  # fmt: skip
    difference = paired_bootstrap(scores, guesses, groups=_contexts(measured, known))
    return _floor(scores, guesses, difference)


def _swapped(measured: Measured, known: Sequence[int], predictions: Sequence[str]) -> np.ndarray:
    """For each question, how often an answer to another one would have been right."""
    from hashattn.evaluation.metrics import first_line, string_match_part

    lines = [first_line(predictions[number]) for number in known]
    means = []
    for number in known:
        hits = [string_match_part(line, measured.asked[number].answers) for line in lines]
        own = known.index(number)
        means.append((sum(hits) - hits[own]) / max(1, len(hits) - 1))
    return np.array(means)


def _contexts(measured: Measured, known: Sequence[int]) -> list[str]:
    return [measured.asked[number].context.text for number in known]


def _floor(dense: Sequence[float], guess: Sequence[float], difference: Difference) -> Floor:
    clear = len(dense) >= _LEAST and difference.low > 0
    return Floor(
        float(np.mean(dense)), float(np.mean(guess)), difference.difference, difference.low,
        difference.high, len(dense), clear,
    )  # fmt: skip


def _quality(
    measured: Measured, settings: PilotSettings, density: float, name: str,
    floors: dict[str, Floor | None], known: Sequence[int],
) -> Quality:  # fmt: skip
    rows = measured.rows(measured.fidelity, density)
    kl = paired_bootstrap(rows["kl"], np.zeros(len(rows)))
    limit = settings.kl_limit
    verdict = KEPT if kl.high <= limit else LOST if kl.low > limit else OPEN
    enough = len(rows) >= _LEAST and floors["text"] is not None and floors["text"].clear
    ratio = math.exp(min(50.0, (rows["nll"] - rows["dense_nll"]).mean()))
    more = _more(len(rows), limit - kl.difference, kl) if verdict == OPEN else None
    means = {name: float(rows[name].mean()) for name in ("agreement", "same_tokens")}
    closeness = Closeness(
        kl.difference, kl.low, kl.high, perplexity_ratio=ratio, **means,
        new_tokens=int(rows["new_tokens"].max()), documents=len(rows),
        verdict=verdict if enough else UNJUDGED, more=more if enough else None,
    )  # fmt: skip
    read, own = [rows], {QUESTIONS: None, QUOTES: None}
    if measured.asked:
        own[name] = _answers(measured, settings, density, floors[name], known)
        read.append(measured.rows(measured.answers, density))
    counted = float(np.concatenate([part["density"].to_numpy() for part in read]).mean())
    return Quality(density, counted, own[QUESTIONS], own[QUOTES], closeness)


def _answers(
    measured: Measured, settings: PilotSettings, density: float, floor: Floor | None,
    known: Sequence[int],
) -> Answers:  # fmt: skip
    dense, sparse = (measured.rows(measured.answers, d) for d in (None, density))
    same = dense["prediction"].str.strip() == sparse["prediction"].str.strip()
    if not known:
        return Answers(None, None, None, None, None, len(dense), float(same.mean()), UNJUDGED)
    same = float(same.to_numpy()[known].mean())
    scores = [rows["score"].to_numpy()[known] for rows in (sparse, dense)]
    found = paired_bootstrap(*scores, groups=_contexts(measured, known))
    limit = -settings.tolerance
    verdict = KEPT if found.low >= limit else LOST if found.high < limit else OPEN
    more = _more(len(known), found.difference - limit, found) if verdict == OPEN else None
    clear = floor is not None and floor.clear
    sparse_mean, dense_mean = (float(own.mean()) for own in scores)
    return Answers(
        dense_mean, sparse_mean, found.difference, found.low, found.high, len(known), same,
        verdict if clear else UNJUDGED, more if clear else None,
    )  # fmt: skip


def _more(count: int, distance: float, found: Difference) -> int | None:
    """Samples in all for which an interval as wide as this one's half, shrunk by the root of their
    number, would end before the limit, `distance` away from the mean."""
    half = max(found.high - found.difference, found.difference - found.low)
    if distance == 0 or not (needed := count * (half / distance) ** 2) < _FARTHEST * count:
        return None
    return max(count + 1, math.ceil(needed))


def _recommend(
    floors: dict[str, Floor | None], quality: Sequence[Quality], preflight: Any, embedded: bool
) -> tuple[str, float | None, list[Reason]]:
    expected = {name: getattr(preflight, name) for name in ("ceiling", "share", "speedup")}
    gain = Reason(f"preflight_{preflight.verdict}", expected)
    unclear = [_unclear(name, floor) for name, floor in floors.items() if floor and not floor.clear]
    if embedded:
        unclear.insert(0, Reason("model_is_embedded", {}))
    if preflight.verdict == "no":
        return NO_GO, None, [gain, *unclear]
    if unclear:
        return UNJUDGED, None, [*unclear, gain]
    for verdict, accepted in ((GO, (KEPT, UNJUDGED)), (FALLBACK, (KEPT, OPEN, UNJUDGED))):
        fitting = [q for q in quality if all(part.verdict in accepted for _, part in q.judged)]
        if fitting:
            best = fitting[-1]  # budgets come from the largest to the smallest
            return verdict, best.budget, [*_measures(best), gain]
    return NO_GO, None, [*_measures(quality[0]), gain]


def _unclear(name: str, floor: Floor) -> Reason:
    if floor.count < _LEAST:
        return Reason("nothing_to_judge", {"measure": name, "count": floor.count, "least": _LEAST})
    values = {"dense": floor.dense, "guess": floor.guess, "count": floor.count}
    if name == "text":
        return Reason("text_not_predicted", values)
    return Reason("dense_cannot_answer", values | {"measure": name, "low": floor.low})


def _measures(quality: Quality) -> list[Reason]:
    """What was found at a budget, in words' keys; nothing of what cannot be judged."""
    reasons = []
    for name, part in quality.judged:
        if part.verdict == UNJUDGED:
            continue
        values = {"budget": quality.budget} | asdict(part)
        if name == "fidelity":
            reasons.append(Reason(f"fidelity_{part.verdict}", values))
        else:
            reasons.append(Reason(f"quality_{part.verdict}", values | {"measure": name}))
    return reasons


def _remarks(plan: Plan) -> list[Reason]:
    cut = cut_contexts(plan)
    return [Reason("contexts_cut", cut)] if cut["contexts"] else []


def cut_contexts(plan: Plan) -> dict[str, int]:
    """Documents that did not fit a context and were read in parts (contexts), of how many, and
    questions whose answer stands in no part that was read (answers_lost)."""
    return {
        "contexts": len(plan.divided), "of": len(plan.scored) + len(plan.calibration),
        "answers_lost": sum(each.lost for each in plan.asked),
    }  # fmt: skip

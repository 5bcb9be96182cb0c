"""What the measurements say: can the model do the task at all, is quality kept, at which budget.

The floor decides. Where dense attention's score cannot be told from guessing, nothing is said of
sparse attention on that measure but "cannot be judged"; and the recommendation is that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hashattn.evaluation.statistics import Difference, paired_bootstrap
from hashattn.pilot.floor import LEAST, Floor, difference, text_floor
from hashattn.pilot.measurements import Measured
from hashattn.pilot.plan import QUESTIONS, QUOTES, Asked, Plan
from hashattn.pilot.settings import PilotSettings

KEPT, LOST, OPEN, UNJUDGED = "kept", "lost", "open", "cannot_be_judged"
_FINE = (KEPT, UNJUDGED)  # of what cannot be judged nothing is known to be lost
GO, FALLBACK, NO_GO = "go", "go_with_fallback", "no_go"
_FARTHEST = 100  # times as many samples as there are, beyond which no number is given


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
    same: float | None
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
    latency: Mapping[str, Any] | None = None, embedded: bool = False,
) -> Judgement:  # fmt: skip
    """What is to be recommended, from measurements and pre-flight (capacity.Preflight).

    No go: pre-flight says that there is nothing to gain, or the largest budget loses more than is
    tolerated, be it by its mean alone. Cannot be judged: the text is predicted no better than a
    file compressor does, dense attention's answers cannot be told from guesses, or the model is the
    embedded one. Go: at the smallest budget for which it and all larger ones keep all that could be
    judged. Go with fallback, at the largest budget: that fails for want of certainty alone, its
    means being within what is tolerated.
    latency: of latency.step_times, for a remark.
    """
    floors = {QUESTIONS: None, QUOTES: None, "text": _text_floor(measured)}
    if measured.floor is not None:
        known = next(each for each in measured.asked if each.answers)
        floors[_kind(known)] = measured.floor
    quality = tuple(_quality(measured, settings, d, floors) for d in settings.budgets)
    verdict, budget, reasons = _recommend(floors, quality, settings, preflight, embedded)
    remarks = [*_left_out(measured), *_remarks(plan), *_speed(latency, budget)]
    return Judgement(floors, quality, verdict, budget, (*reasons, *remarks))


def _kind(asked: Asked) -> str:
    return QUOTES if asked.record.dataset == QUOTES else QUESTIONS


def _left_out(measured: Measured) -> list[Reason]:
    return [
        Reason("language_left_out", {"language": language, "count": floor.count,
                                     "dense": floor.dense, "guess": floor.guess})
        for language, floor in measured.left_out.items()
    ]  # fmt: skip


def _text_floor(measured: Measured) -> Floor:
    dense = measured.rows(measured.fidelity, None)
    return text_floor(dense, measured.read_bytes, measured.packed)


def _quality(
    measured: Measured, settings: PilotSettings, density: float, floors: dict[str, Floor | None]
) -> Quality:
    rows = measured.rows(measured.fidelity, density)
    kl = paired_bootstrap(rows["kl"], np.zeros(len(rows)))
    limit = settings.kl_limit
    verdict = KEPT if kl.high <= limit else LOST if kl.low > limit else OPEN
    enough = len(rows) >= LEAST and floors["text"] is not None and floors["text"].clear
    ratio = math.exp(min(50.0, (rows["nll"] - rows["dense_nll"]).mean()))
    more = _more(len(rows), limit - kl.difference, kl) if verdict == OPEN else None
    means = {name: float(rows[name].mean()) for name in ("agreement", "same_tokens")}
    closeness = Closeness(
        kl.difference, kl.low, kl.high, perplexity_ratio=ratio, **means,
        new_tokens=int(rows["new_tokens"].max()), documents=len(rows),
        verdict=verdict if enough else UNJUDGED, more=more if enough else None,
    )  # fmt: skip
    read = [rows["density"]]
    if measured.compared:
        read.append(measured.rows(measured.answers, density)["density"])
    answers = {
        kind: _answers(measured, settings, density, kind, floors[kind])
        for kind in (QUESTIONS, QUOTES)
        if any(_kind(each) == kind for each in measured.asked)
    }
    counted = float(np.concatenate(read).mean())
    return Quality(density, counted, answers.get(QUESTIONS), answers.get(QUOTES), closeness)


def _answers(
    measured: Measured, settings: PilotSettings, density: float, kind: str, floor: Floor | None
) -> Answers:
    """Of the questions or quotes that were compared; no verdict where no answer to one is known."""
    own = [number for number, each in enumerate(measured.compared) if _kind(each) == kind]
    if not own:
        count = sum(_kind(each) == kind for each in measured.asked)
        return Answers(None, None, None, None, None, count, None, UNJUDGED)
    dense, sparse = (measured.rows(measured.answers, d).iloc[own] for d in (None, density))
    same = dense["prediction"].str.strip() == sparse["prediction"].str.strip()
    asked = [measured.compared[number] for number in own]
    known = [number for number, each in enumerate(asked) if each.answers]
    if not known:
        return Answers(None, None, None, None, None, len(own), float(same.mean()), UNJUDGED)
    scores = [rows["score"].to_numpy()[known] for rows in (sparse, dense)]
    found = difference(*scores, [asked[number] for number in known])
    limit = -settings.tolerance
    verdict = KEPT if found.low >= limit else LOST if found.high < limit else OPEN
    more = _more(len(known), found.difference - limit, found) if verdict == OPEN else None
    clear = floor is not None and floor.clear
    sparse_mean, dense_mean = (float(own.mean()) for own in scores)
    return Answers(
        dense_mean, sparse_mean, found.difference, found.low, found.high, len(known),
        float(same.to_numpy()[known].mean()), verdict if clear else UNJUDGED,
        more if clear else None,
    )  # fmt: skip


def _more(count: int, distance: float, found: Difference) -> int | None:
    """Samples in all for which an interval as wide as this one's half, shrunk by the root of their
    number, would end before the limit, `distance` away from the mean."""
    half = max(found.high - found.difference, found.difference - found.low)
    if distance == 0 or not (needed := count * (half / distance) ** 2) < _FARTHEST * count:
        return None
    return max(count + 1, math.ceil(needed))


def _recommend(
    floors: dict[str, Floor | None],
    quality: Sequence[Quality],
    settings: PilotSettings,
    preflight: Any,
    embedded: bool,
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
    best = None
    for one in quality:  # from the largest budget to the smallest
        if not all(part.verdict in _FINE for _, part in one.judged):
            break
        best = one
    if best is not None:
        return GO, best.budget, [*_measures(best), gain]
    largest = quality[0]
    within = all(_within(part, settings) for _, part in largest.judged)
    verdict = FALLBACK if within else NO_GO
    return verdict, largest.budget if within else None, [*_measures(largest), gain]


def _within(part: Answers | Closeness, settings: PilotSettings) -> bool:
    """Nothing is lost, and what is open has a mean that is within what is tolerated."""
    if part.verdict != OPEN:
        return part.verdict in _FINE
    if isinstance(part, Closeness):
        return part.kl <= settings.kl_limit
    return part.difference >= -settings.tolerance


def _unclear(name: str, floor: Floor) -> Reason:
    if floor.count < LEAST:
        return Reason("nothing_to_judge", {"measure": name, "count": floor.count, "least": LEAST})
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
    remarks, cut = [], cut_contexts(plan)
    if cut["contexts"]:
        remarks.append(Reason("contexts_cut", cut))
    for key, count in (("questions_withheld", plan.withheld), ("questions_beyond", plan.beyond)):
        if count:
            remarks.append(Reason(key, {"count": count}))
    return remarks


def _speed(latency: Mapping[str, Any] | None, budget: float | None) -> list[Reason]:
    """What a step was measured to gain or lose on this machine, at the budget or else the first."""
    if latency is None:
        return []
    at = next((b for b in latency["budgets"] if b["budget"] == budget), latency["budgets"][0])
    context, below = latency["context"], at["dense_below"]
    if below is None:
        return [Reason("never_faster_here", {})]
    if context < below:
        return [Reason("dense_here", {"context": context, "dense_below": below})]
    key = "faster_here" if at["speedup"] > 1 else "slower_here"
    return [Reason(key, {"speedup": at["speedup"], "context": context})]


def cut_contexts(plan: Plan) -> dict[str, int]:
    """Documents that did not fit a context and were read in parts (contexts), of how many, and
    questions whose answer stands in no part that was read (answers_lost)."""
    return {
        "contexts": len(plan.divided), "of": len(plan.scored) + len(plan.calibration),
        "answers_lost": sum(each.lost for each in plan.asked),
    }  # fmt: skip

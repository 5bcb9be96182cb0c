"""The floor decides: where the model itself cannot be told from guessing, nothing that rests on its
answers is called kept or lost, whatever the result says."""

from __future__ import annotations

import copy
from typing import Any

CANNOT = "cannot_be_judged"
FLOOR_OF = {"questions": "questions", "quotes": "quotes", "fidelity": "text"}  # of each measure
_QUALITY = {"quality_kept", "quality_open", "quality_lost"}
_FIDELITY = {"fidelity_kept", "fidelity_open", "fidelity_lost"}
_LOST = {"quality_lost", "fidelity_lost"}
_OTHER_GROUNDS = {"preflight_no", "slower_here"}  # on which a pilot may say no without quality


def _is_clear(result: dict[str, Any], measure: str) -> bool:
    """Whether full attention was told from guessing by what `measure` rests on; a floor that was
    not measured tells nothing."""
    floor = result["floors"][FLOOR_OF[measure]]
    return floor is not None and floor["clear"]


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checked result in which no verdict, reason or recommendation rests on a measure
    whose floor is not clear."""
    result = copy.deepcopy(result)
    clear = {measure: _is_clear(result, measure) for measure in FLOOR_OF}
    for row in result["quality"]:
        for measure in FLOOR_OF:
            if row[measure] is not None and not clear[measure]:
                row[measure] |= {"verdict": CANNOT, "more": None}
    recommendation = result["recommendation"]
    before = recommendation["reasons"]
    recommendation["reasons"] = reasons = []
    for reason in before:
        measure = _rests_on(reason)
        if measure is not None and not clear[measure]:
            reason = {"key": "not_judged", "values": {"measure": measure}}
        if reason not in reasons:
            reasons.append(reason)
    if recommendation["verdict"] == CANNOT or not _has_ground(recommendation, before, clear):
        recommendation |= {"verdict": CANNOT, "budget": None}
    return result


def _rests_on(reason: dict[str, Any]) -> str | None:
    """The measure that a reason calls kept, open or lost; None of other reasons."""
    if reason["key"] in _QUALITY:
        return reason["values"].get("measure", "questions")
    return "fidelity" if reason["key"] in _FIDELITY else None


def _has_ground(
    recommendation: dict[str, Any], before: list[dict[str, Any]], clear: dict[str, bool]
) -> bool:
    """A yes needs a clear floor; so does a no that rested on a loss, unless on something else."""
    if recommendation["verdict"] != "no_go":
        return any(clear.values())
    keys = {reason["key"] for reason in recommendation["reasons"]}
    was_lost = any(reason["key"] in _LOST for reason in before)
    return not was_lost or bool(keys & (_LOST | _OTHER_GROUNDS))

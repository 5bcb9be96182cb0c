"""What a pilot found, as `pilot.json` holds it: read, and checked before anything is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_count, is_number, require, require_one_of
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json
from hashattn.pilot.settings import LANGUAGES

FORMAT = 1
VERDICTS = ("go", "go_with_fallback", "no_go", "cannot_be_judged")
FINDINGS = ("kept", "lost", "open", "cannot_be_judged")
# of an audit page: plain names below the report's folder, nothing a browser takes for an address
_PLAIN_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*\.html")

Shape = Any  # a dict of shapes, a list of one shape, or a leaf that checks a value


class ReportError(HashAttnError, ValueError):
    """A pilot's result cannot be shown: not of this format, a field missing, or a sentence."""


def load_result(path: str | Path) -> dict[str, Any]:
    """The result in a `pilot.json`; ReportError naming the file and field where it is not one."""
    result = read_json(path, ReportError)
    try:
        check_result(result)
    except ReportError as problem:
        raise ReportError(f"{path}: {problem}; write it again with make pilot") from problem
    return result


def check_result(result: Any) -> None:
    """ReportError naming the first field that is missing or does not hold what it must; fields
    beside those are left alone."""
    require(isinstance(result, dict), "result", result, "an object", ReportError)
    require(
        result.get("format") == FORMAT, "format", result.get("format"), str(FORMAT), ReportError
    )
    _check(result, _RESULT, "")
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as problem:  # beside the fields: an array, a NaN
        raise ReportError(f"the result is not plain JSON ({problem})") from problem


def _check(value: Any, shape: Shape, where: str) -> None:
    if isinstance(shape, dict):
        require(isinstance(value, dict), where, value, "an object", ReportError)
        for key, inner in shape.items():
            field = f"{where}.{key}" if where else key
            if key not in value:
                raise ReportError(f"{field} is missing")
            _check(value[key], inner, field)
    elif isinstance(shape, list):
        require(isinstance(value, list | tuple), where, value, "a list", ReportError)
        for number, item in enumerate(value):
            _check(item, shape[0], f"{where}[{number}]")
    else:
        shape(value, where)


def _leaf(valid: Callable[[Any], bool], allowed: str) -> Shape:
    def check(value: Any, where: str) -> None:
        require(valid(value), where, value, allowed, ReportError)

    return check


def _maybe(shape: Shape) -> Shape:
    """null, or `shape`."""
    return lambda value, where: None if value is None else _check(value, shape, where)


def _one_of(names: tuple[str, ...]) -> Shape:
    return lambda value, where: require_one_of(where, value, names, ReportError)


_NUMBER = _leaf(is_number, "a number")
_SHARE = _leaf(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
_COUNT = _leaf(lambda v: is_count(v, 0), "a whole number of at least 0")
_BOOL = _leaf(lambda v: isinstance(v, bool), "true or false")
_TEXT = _leaf(lambda v: isinstance(v, str), "a text")
_OBJECT = _leaf(lambda v: isinstance(v, dict), "an object")
_PATH = _leaf(
    lambda v: isinstance(v, str) and _PLAIN_PATH.fullmatch(v) is not None and ".." not in v,
    "a path like audit/03.html: plain names below the report's folder",
)

_SENTENCES = [{"key": _TEXT, "values": _OBJECT}]
_FILES = [{"name": _TEXT, "kind": _TEXT, "characters": _COUNT, "tokens": _COUNT, "cut": _BOOL}]
_TIMES = {"median": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_FLOOR = _maybe({
    "dense": _NUMBER, "guess": _NUMBER, "difference": _NUMBER, "low": _NUMBER, "high": _NUMBER,
    "count": _COUNT, "clear": _BOOL,
})  # fmt: skip
_MEASURE = _maybe({
    **dict.fromkeys(("dense", "sparse", "difference", "low", "high"), _maybe(_NUMBER)),
    "count": _COUNT, "verdict": _one_of(FINDINGS), "more": _maybe(_COUNT),
    "same": _maybe(_NUMBER),
})  # fmt: skip
_FIDELITY = _maybe({
    "kl": _NUMBER, "kl_low": _NUMBER, "kl_high": _NUMBER, "agreement": _NUMBER,
    "perplexity_ratio": _NUMBER, "same_tokens": _maybe(_NUMBER), "new_tokens": _maybe(_COUNT),
    "documents": _COUNT, "verdict": _one_of(FINDINGS), "more": _maybe(_COUNT),
})  # fmt: skip
_RESULT = {
    "language": _one_of(LANGUAGES),
    "title": _TEXT,
    "recommendation": {
        "verdict": _one_of(VERDICTS), "budget": _maybe(_SHARE), "reasons": _SENTENCES,
    },
    "made": {
        "date": _TEXT, "version": _TEXT, "code": _maybe(_TEXT), "model": _TEXT,
        "model_sha256": _maybe(_TEXT), "model_note": _TEXT, "machine": _OBJECT,
        "settings": _OBJECT, "command": _TEXT, "seconds": _maybe(_NUMBER),
    },
    "preflight": _maybe({
        "verdict": _one_of(("worth", "marginal", "no")), "reasons": _SENTENCES,
        "changes": _SENTENCES, "lines": [{"key": _TEXT, "value": _maybe(_NUMBER), "unit": _TEXT}],
        "memory": [{
            "note": {"key": _TEXT, "values": _OBJECT}, "bytes": _NUMBER, "longest_context": _COUNT,
        }],
        "cost": _maybe({
            "gpu_hours_dense": _NUMBER, "gpu_hours_sparse": _NUMBER,
            "money_dense": _maybe(_NUMBER), "money_sparse": _maybe(_NUMBER),
            "currency": _maybe(_TEXT), "price_per_hour": _maybe(_NUMBER),
            "tokens_per_day": _maybe(_NUMBER), "days": _maybe(_NUMBER),
        }),
    }),
    "documents": {
        "scored": _FILES, "calibration": _FILES, "unused": _FILES,
        "skipped": [{"name": _TEXT, "reason": _TEXT}],
    },
    "cut": _maybe({"contexts": _COUNT, "of": _COUNT, "answers_lost": _maybe(_COUNT)}),
    "codes": _maybe({
        "method": _TEXT, "bits": _maybe(_COUNT), "origin": _TEXT, "mass": _maybe(_NUMBER),
        "mass_of_exact": _maybe(_NUMBER), "mass_before": _maybe(_NUMBER),
        "tokens": _maybe(_COUNT), "bytes_per_token": _NUMBER,
    }),
    "floors": {"questions": _FLOOR, "quotes": _FLOOR, "text": _FLOOR},
    "quality": [{
        "budget": _SHARE, "density": _SHARE, "questions": _MEASURE, "quotes": _MEASURE,
        "fidelity": _FIDELITY,
    }],
    "latency": _maybe({
        "context": _COUNT, "device": _TEXT, "steps": _COUNT, "prefill_seconds": _NUMBER,
        "dense_ms": _TIMES,
        "budgets": [{
            "budget": _SHARE, "ms": _TIMES, "speedup": _NUMBER, "dense_below": _maybe(_COUNT),
        }],
    }),
    "memory": _maybe({
        "kv_bytes_per_token": _NUMBER, "code_bytes_per_token": _NUMBER, "context": _COUNT,
        "kv_bytes": _NUMBER, "code_bytes": _NUMBER,
    }),
    "changed": [{
        "question": _TEXT, "document": _maybe(_TEXT), "expected": _maybe([_TEXT]),
        "dense": _TEXT, "sparse": _TEXT, "dense_right": _maybe(_BOOL),
        "sparse_right": _maybe(_BOOL), "budget": _SHARE, "audit": _maybe(_PATH),
    }],
    "monitor": _SENTENCES,
    "private": {"sockets_denied": _BOOL, "offline": _BOOL},
}  # fmt: skip

"""Scores of one prediction against its accepted answers, all in 0..1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence


def first_line(prediction: str) -> str:
    """The text before the first line break, without the white space around it."""
    return prediction.strip().split("\n", 1)[0].strip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the first line of the prediction is one of the answers, else 0.0."""
    _require_answers(answers)
    return float(first_line(prediction) in {answer.strip() for answer in answers})


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's token F1, best over the answers.

    Tokens are what white space separates after lower-casing and removing punctuation and the
    articles a, an, the (LongBench metrics.py; the same as SQuAD's).
    """
    _require_answers(answers)
    words = _words(prediction)
    return max(_f1(words, _words(answer)) for answer in answers)


def string_match_all(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """RULER's: the share of the answers that occur in the prediction, whatever their case."""
    _require_answers(answers)
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """RULER's for question answering: 1.0 if any answer occurs in the prediction, else 0.0."""
    _require_answers(answers)
    return float(any(answer.lower() in prediction.lower() for answer in answers))


METRICS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "qa_f1": qa_f1,
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers = {answers!r} must be a non-empty list of strings")

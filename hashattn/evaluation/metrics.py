"""Scores of one prediction against its accepted answers, all in 0..1.

LongBench's nine metrics by their official definition (THUDM/LongBench, metrics.py), oddities
included: published numbers contain them. A score is the best over the answers.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from hashattn.base.checks import require
from hashattn.evaluation.rouge import OVERFLOW, rouge_l_f
from hashattn.evaluation.segment import chinese_words

Metric = Callable[..., float]  # (prediction, answers, all_classes=None) -> 0..1


def first_line(prediction: str) -> str:
    """The first line of a prediction that is not empty."""
    return prediction.lstrip("\n").split("\n", 1)[0]


def exact_match(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """1.0 if the first line of the prediction is one of the answers, else 0.0."""
    line = first_line(prediction.strip()).strip()
    return _best(answers, lambda answer: float(line == answer.strip()))


def qa_f1(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Token F1, as SQuAD's: tokens are what white space separates after lower-casing and removing
    punctuation and the articles a, an, the."""
    words = _words(prediction)
    return _best(answers, lambda answer: _f1(words, _words(answer)))


def qa_f1_zh(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Token F1 over jieba's words, lower-cased, without punctuation and white space."""
    words = _chinese_tokens(prediction)
    return _best(answers, lambda answer: _f1(words, _chinese_tokens(answer)))


def rouge_l(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """ROUGE-L F of the summary level, as the package `rouge` counts it (see rouge.py)."""
    return _best(answers, lambda answer: rouge_l_f(prediction, answer))


def rouge_zh(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """ROUGE-L F over jieba's words."""
    text = " ".join(chinese_words(prediction))
    # the official function calls the English one: its stack is one frame deeper
    return _best(
        answers, lambda answer: rouge_l_f(text, " ".join(chinese_words(answer)), OVERFLOW - 1)
    )


def classification(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """1 / (number of classes that the prediction names), 0 if the answer is not among them."""
    allowed = "the record's list of class names, which classification needs"
    require(bool(all_classes), "all_classes", all_classes, allowed)
    return _best(answers, lambda answer: _named_class(prediction, answer, all_classes))


def retrieval(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Share of the prediction's integers that are the answer's "Paragraph <number>"."""
    return _best(answers, lambda answer: _share(prediction, _number(answer, "Paragraph ")))


def retrieval_zh(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Share of the prediction's integers that are the answer's "段落<number>"."""
    return _best(answers, lambda answer: _share(prediction, _number(answer, "段落")))


def count(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Share of the prediction's integers that are the answer."""
    return _best(answers, lambda answer: _share(prediction, answer))


def code_sim(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Similarity of the first line of code, rounded to hundredths.

    As fuzzywuzzy measures it without python-Levenshtein, which LongBench's requirements.txt (and
    the HashAttention authors') does not list: difflib's ratio, which depends on argument order.
    """
    from difflib import SequenceMatcher

    return _code_similarity(prediction, answers, lambda a, b: SequenceMatcher(None, a, b).ratio())


def code_sim_levenshtein(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """code_sim as LongBench computes it where python-Levenshtein is installed: scores differ."""
    from rapidfuzz.distance import Indel

    return _code_similarity(prediction, answers, Indel.normalized_similarity)


def string_match_all(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """RULER's: the share of the answers that occur in the prediction, ignoring case."""
    _check_answers(answers)
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """RULER's for question answering: 1.0 if any answer occurs, ignoring case, else 0.0."""
    return _best(answers, lambda answer: float(answer.lower() in prediction.lower()))


def holds_answer(
    prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """1.0 if any answer occurs as whole words ("7" does not in "1975"), else 0.0. Case, spacing and
    width (Unicode NFKC) are ignored."""
    text = _plain(prediction)
    return _best(answers, lambda answer: float(_occurs(_plain(answer), text)))


def _occurs(answer: str, text: str) -> bool:
    words = rf"(?<![0-9a-z]){re.escape(answer)}(?![0-9a-z])"
    return bool(answer) and re.search(words, text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        exact_match, qa_f1, qa_f1_zh, rouge_l, rouge_zh, classification, retrieval, retrieval_zh,
        count, code_sim, code_sim_levenshtein, string_match_all, string_match_part, holds_answer,
    )
}  # fmt: skip


def _check_answers(answers: Sequence[str]) -> None:
    valid = bool(answers) and not isinstance(answers, str)
    require(valid, "answers", answers, "a non-empty list of strings")


def _best(answers: Sequence[str], score: Callable[[str], float]) -> float:
    _check_answers(answers)
    return max(score(answer) for answer in answers)


def _words(text: str) -> list[str]:
    unpunctuated = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", unpunctuated).split()


# CJK, full-width and typographic punctuation that LongBench drops, as ranges of code points
_CHINESE_PUNCTUATION = frozenset(
    chr(point)
    for low, high in (
        (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003),
        (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F),
        (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
    )
    for point in range(low, high + 1)
) | frozenset(string.punctuation)  # fmt: skip


def _chinese_tokens(text: str) -> list[str]:
    words = (
        "".join(c for c in word.lower() if c not in _CHINESE_PUNCTUATION)
        for word in chinese_words(text)
    )
    tokens = ("".join(word.split()) for word in words)
    return [token for token in tokens if token]


def _f1(prediction: list[str], answer: list[str]) -> float:
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def _named_class(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    named = [name for name in all_classes if name in prediction]
    # as the official loop, which removes from the list it iterates over: the name after a removed
    # one is skipped and may stay, and published scores depend on it
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def _number(answer: str, label: str) -> str:
    match = re.search(label + r"(\d+)", answer)
    allowed = f"a text that names its paragraph as '{label}<number>'"
    require(match is not None, "answer", answer, allowed)
    return match[1]


def _share(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _code_similarity(
    prediction: str, answers: Sequence[str], ratio: Callable[[str, str], float]
) -> float:
    line = _code_line(prediction)

    def score(answer: str) -> float:
        if line == answer:  # two empty texts count as the same
            return 1.0
        return round(100 * ratio(line, answer)) / 100 if line and answer else 0.0

    return _best(answers, score)


def _code_line(prediction: str) -> str:
    """The first line without a comment mark or a Markdown fence, "" if there is none."""
    lines = prediction.lstrip("\n").split("\n")
    marks = ("`", "#", "//")
    return next((line for line in lines if not any(mark in line for mark in marks)), "")

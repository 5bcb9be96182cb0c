"""Questions about paragraphs in the official structures, made by rule: no download is needed.

squad: a sentence with an identifier blanked, which occurs in no other paragraph.
hotpotqa: the one identifier that two paragraphs share; a quotation names each of them.
They are worded more alike than people's questions and test no knowledge of the world; what they
keep is the structure: one or two answering documents among distractors.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from typing import Any

_IDENTIFIER = re.compile(r"\b(?:[A-Za-z]+_[A-Za-z_]*[A-Za-z]|[a-z]+[A-Z]\w+|[A-Z][a-z]+[A-Z]\w+)\b")
GAP = "____"
_ARTICLE = 8  # paragraphs; SQuAD's dev articles have about 34
CONTEXT = 10  # HotpotQA's documents for a question
QUOTED = 8  # words
_EACH = 10  # most questions with the same answer


@cache
def squad_of(texts: tuple[str, ...]) -> dict[str, Any]:
    """SQuAD 2.0's structure of paragraphs; articles are runs of eight."""
    unique = {name: places[0] for name, places in _places(texts).items() if len(places) == 1}
    sentences = {
        name: next((s for s in _sentences(texts[place]) if name in s), "")
        .strip()
        .replace(name, GAP)
        for name, place in sorted(unique.items())
    }
    # where paragraphs differ in the name alone, several names fit the gap
    counts = Counter(sentences.values())
    questions = defaultdict(list)
    for name, sentence in sentences.items():
        place = unique[name]
        fits = texts[place].count(name) == counts[sentence] == 1
        if fits and 6 <= len(sentence.split()) <= 40:
            questions[place].append({
                "question": f'Which name fills the gap in "{sentence}"?',
                "answers": [{"text": name, "answer_start": texts[place].index(name)}],
                "is_impossible": False,
            })  # fmt: skip
    return {
        "data": [
            {
                "title": f"Paragraphs {start}",
                "paragraphs": [
                    {"context": texts[place], "qas": questions[place]}
                    for place in range(start, min(start + _ARTICLE, len(texts)))
                ],
            }
            for start in range(0, len(texts), _ARTICLE)
        ]
    }


@cache
def hotpot_of(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """HotpotQA's structure; the eight distractors are drawn from the other paragraphs."""
    shared = defaultdict(set)
    for name, places in _places(texts).items():
        for pair in combinations(places, 2):
            shared[pair].add(name)
    rows, answer_counts = [], Counter()
    for pair, names in sorted(shared.items()):
        (name, *more) = sorted(names)
        quotations = [_quotation(texts, place, name) for place in pair]
        if more or answer_counts[name] == _EACH or None in quotations:
            continue
        answer_counts[name] += 1
        first, second = quotations
        rng = random.Random(f"hotpotqa/{pair}")
        others = rng.sample([i for i in range(len(texts)) if i not in pair], CONTEXT - 2)
        documents = rng.sample([*pair, *others], CONTEXT)
        rows.append({
            "question": f'Which name is both in the document that says "{first}" and in the '
            f'document that says "{second}"?',
            "answer": name,
            "context": [[_title(i), _sentences(texts[i])] for i in documents],
            "supporting_facts": [[_title(place), 0] for place in pair],
        })  # fmt: skip
    return rows


@cache
def _places(texts: tuple[str, ...]) -> dict[str, list[int]]:
    """Paragraphs (indices, ascending) in which each identifier occurs."""
    places = defaultdict(list)
    for place, text in enumerate(texts):
        for name in sorted(set(_IDENTIFIER.findall(text))):
            places[name].append(place)
    return places


def _quotation(texts: tuple[str, ...], place: int, name: str) -> str | None:
    """The first QUOTED words of a sentence, without the name, that occur in no other paragraph;
    None if there are none."""
    for sentence in _sentences(texts[place]):
        words = sentence.split()
        quoted = " ".join(words[:QUOTED])
        quotable = len(words) >= QUOTED and name not in quoted and '"' not in quoted
        if quotable and sum(quoted in text for text in texts) == 1:
            return quoted
    return None


def _sentences(text: str) -> list[str]:
    """Sentences with the white space before them, as HotpotQA keeps it: they join to the text."""
    return re.split(r"(?<=[.!?])(?=\s)", text)


def _title(place: int) -> str:
    return f"Paragraph {place}"

"""What a sample draws at random: keys, values, variables, words."""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Collection
from functools import cache

from hashattn.evaluation.benchmarks import words
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.ruler.styles import Style

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t",
          "tr", "v", "z")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "n", "r", "l", "sk", "m")


def number(rng: random.Random, style: Style) -> str:
    """A number of the style's digits, the first not zero."""
    return str(rng.randrange(10 ** (style.digits - 1), 10**style.digits))


def _key_words(rng: random.Random, style: Style) -> str:
    """An adjective and a noun."""
    return style.key_joint.join((rng.choice(words.ADJECTIVES), rng.choice(style.nouns)))


def identifier(rng: random.Random, style: Style) -> str:
    """A random version-4 uuid, or two words in its place."""
    if style.identifiers == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words.COLORS)} {rng.choice(words.OBJECTS)}"


def drawer(kind: str, rng: random.Random, style: Style) -> Callable[[], str]:
    """A function that draws a key or value of a Retrieval's kind."""
    return {
        "numbers": lambda: number(rng, style),
        "words": lambda: _key_words(rng, style),
        "uuids": lambda: identifier(rng, style),
    }[kind]


def distinct(count: int, draw: Callable[[], str], taken: Collection[str] = ()) -> list[str]:
    """The first `count` draws that differ from each other and from `taken`."""
    values: dict[str, None] = {}
    while len(values) < count:
        if (value := draw()) not in taken:
            values[value] = None
    return list(values)


def variables(
    count: int, letters: int, rng: random.Random, style: Style, taken: Collection[str] = ()
) -> list[str]:
    """Names of variables that are not taken: upper-case letters, or words."""
    draw = {
        "letters": lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)),
        "words": lambda: rng.choice(words.OBJECTS),
    }[style.variables]
    return distinct(count, draw, taken)


def coded_words(count: int, letters: int, rng: random.Random) -> list[str]:
    """Words of random lower-case letters."""
    return distinct(count, lambda: "".join(rng.choices(string.ascii_lowercase, k=letters)))


def _pronounceable(rng: random.Random) -> str:
    """A made-up word of two to four syllables."""
    syllables = rng.randint(2, 4)
    parts = (rng.choice(part) for _ in range(syllables) for part in (_ONSETS, _VOWELS, _CODAS))
    return "".join(parts)


class Vocabulary:
    """Any number of different words: real ones in random order, then pronounceable ones."""

    def __init__(self, rng: random.Random) -> None:
        self._words = dict.fromkeys(rng.sample(real_words(), len(real_words())))
        self._rng = rng

    def first(self, count: int) -> list[str]:
        """The first `count` words; they do not depend on how many are asked for."""
        while len(self._words) < count:
            self._words[_pronounceable(self._rng)] = None
        return list(self._words)[:count]


def real_words() -> tuple[str, ...]:
    """Lower-case words of 4 to 12 letters, of the generated tasks and of the corpus, sorted."""
    return _real_words(paragraphs("train"), paragraphs("eval"))


@cache
def _real_words(*parts: tuple[str, ...]) -> tuple[str, ...]:
    text = " ".join(line for part in parts for line in part)
    corpus_words = set(re.findall(r"(?<!\S)[a-z]{4,12}(?=[ .,;:]|$)", text))
    groups = (words.ADJECTIVES, words.ANIMALS, words.FOODS, words.JOBS, words.OBJECTS)
    return tuple(sorted(corpus_words.union(*groups)))

"""What hides the needles: prose, which starts over at its end, or a few repeated sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle, islice
from pathlib import Path

from hashattn.base.checks import is_text
from hashattn.base.files import parse_json, read_text
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.ruler.specs import RulerError
from hashattn.evaluation.benchmarks.ruler.styles import NOISE

NOISE_WORDS = " ".join(NOISE).split()


@dataclass(frozen=True)
class Haystack:
    """Prose. name: how records cite it."""

    text: str
    name: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RulerError(f"haystack {self.name!r} holds no text; give some prose")

    @cached_property
    def sentences(self) -> tuple[tuple[str, ...], ...]:
        """Sentences as words; one ends with a full stop, `?` or `!` before white space."""
        sentences = re.split(r"(?<=[.!?])\s+", self.text.strip())
        return tuple(tuple(sentence.split()) for sentence in sentences)

    def read(self, words: int, rng: random.Random) -> list[str]:
        """Sentences with `words` words in all (the last one cut), from a random sentence on.

        The text starts over at its end, as RULER's essays do.
        """
        start = rng.randrange(len(self.sentences))
        endless = cycle(chain(self.sentences[start:], self.sentences[:start]))
        return [" ".join(sentence) for sentence in _cut(endless, words)]


def read_haystack(source: str | Path | Haystack | None) -> Haystack:
    """None: the evaluation paragraphs of data/corpus. A path: a text file, or RULER's essays in
    JSON ({"text": ...}). RulerError for a file that is missing or in neither form."""
    if source is None:
        return corpus()
    if isinstance(source, Haystack):
        return source
    path = Path(source)
    if not path.is_file():
        raise RulerError(f"no haystack at {path}; give a text file, or Haystack(text, name)")
    text = read_text(path, RulerError)
    if path.suffix == ".json":
        essays = parse_json(text, str(path), RulerError)
        text = essays.get("text") if isinstance(essays, dict) else None
        if not is_text(text):
            raise RulerError(f'{path} is not RULER\'s JSON {{"text": ...}}')
    return Haystack(text, f"{path.stem}@{sha256_text(text)[:8]}")


def corpus() -> Haystack:
    """The evaluation paragraphs of data/corpus, which no model of this repository trained on."""
    return Haystack(" ".join(paragraphs("eval")), "corpus")


def noise(words: int) -> list[str]:
    """Lines of the noise sentences, `words` words in all; the last may be cut."""
    lines = _cut(cycle([NOISE_WORDS]), words)
    return [" ".join(line) for line in lines]


def _cut(endless: Iterator, words: int) -> Iterator[tuple[str, ...]]:
    """Items (sequences of words) up to `words` words in all; the last is shortened."""
    for item in endless:
        if words <= 0:
            return
        yield tuple(islice(item, words))
        words -= len(item)

"""cwe and fwe: which words occur most often."""

from __future__ import annotations

import math
import random

from hashattn.evaluation.benchmarks.ruler.draws import Vocabulary, coded_words
from hashattn.evaluation.benchmarks.ruler.prompt import Prompt, worded
from hashattn.evaluation.benchmarks.ruler.specs import SHORT, CommonWords, FrequentWords
from hashattn.evaluation.benchmarks.ruler.styles import Style

# the solved example: words in the list, times that a common one occurs, times that another does
EXAMPLE, SHORT_EXAMPLE = (40, 10, 3), (20, 3, 1)
REPEATS, SHORT_REPEATS = (30, 3), (6, 1)  # the same two times, in the list that is asked about
_TOKENS_PER_CODED_WORD = 50  # tokens of the prompt for each entry of fwe's vocabulary
_DOTS = "..."


class CommonWordsSample:
    """Size: different words in the list (fill is not needed), which follows one solved example."""

    step = 64

    def __init__(self, task: CommonWords, style: Style, seed: str, length: int) -> None:
        rng = random.Random(seed)
        short = length < SHORT
        size, *repeats = SHORT_EXAMPLE if short else EXAMPLE
        self._wording, self._seed, self._common = style.common, seed, task.common
        self._repeats = SHORT_REPEATS if short else REPEATS
        example = Vocabulary(rng).first(size)
        solved = worded(style.common, self._list(example, *repeats))
        self._example = f"{solved} {_numbered(example[: task.common])}\n"
        self._words = Vocabulary(rng)
        self.answers = tuple(self._words.first(task.common))
        self.smallest = task.common + 1

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        prompt = worded(self._wording, self._list(self._words.first(size), *self._repeats))
        return Prompt(self._example + prompt.text, prompt.question, prompt.prefix)

    def _list(self, words: list[str], often: int, seldom: int) -> str:
        entries = words[: self._common] * often + words[self._common :] * seldom
        random.Random(f"{self._seed}/order").shuffle(entries)
        return _numbered(entries)


class FrequentWordsSample:
    """Size: words drawn in all, of which rank k gets the share k ** -2 / zeta(2), rounded down.

    Rank 1 is the dots. fill: more dots, since several ranks can gain a word at once.
    """

    step = 256
    smallest = 64

    def __init__(self, task: FrequentWords, style: Style, seed: str, limit: int) -> None:
        rng = random.Random(seed)
        others = coded_words(limit // _TOKENS_PER_CODED_WORD - 1, task.letters, rng)
        self._ranked = [_DOTS, *others]
        self._wording, self._seed = style.frequent, seed
        self.answers = tuple(others[: task.asked])

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        share = size / (math.pi**2 / 6)  # zeta(2)
        words = [
            word
            for rank, word in enumerate(self._ranked, 1)
            for _ in range(int(share / rank**2))
        ] + [_DOTS] * fill  # fmt: skip
        random.Random(f"{self._seed}/order").shuffle(words)
        return worded(self._wording, " ".join(words))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))

"""vt: which variables hold a value, through a chain of assignments scattered in noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from hashattn.evaluation.benchmarks.ruler.draws import variables
from hashattn.evaluation.benchmarks.ruler.haystack import NOISE_WORDS, noise
from hashattn.evaluation.benchmarks.ruler.prompt import Prompt, worded
from hashattn.evaluation.benchmarks.ruler.sizing import largest_fit
from hashattn.evaluation.benchmarks.ruler.specs import Tracking
from hashattn.evaluation.benchmarks.ruler.styles import Style

LETTERS, EXAMPLE_LETTERS = 5, 3
_EXAMPLE_TOKENS = 500  # of the solved example before the question


class ChainSample:
    """A chain alone, each assignment after the one it needs. Size: words of noise; fill: unused."""

    step = 256

    def __init__(
        self, task: Tracking, style: Style, seed: str, letters: int = LETTERS,
        taken: Collection[str] = (),
    ) -> None:  # fmt: skip
        rng = random.Random(seed)
        self._style, self._seed = style, seed
        self._value = str(rng.randrange(10_000, 100_000))
        self.answers = tuple(variables(task.hops + 1, letters, rng, style, taken))
        first = style.start.format(variable=self.answers[0], value=self._value)
        links = zip(self.answers[1:], self.answers, strict=False)
        steps = [style.step.format(variable=to, value=of) for to, of in links]
        self._chain = [first, *steps]
        self.smallest = len(self._chain) * len(NOISE_WORDS)

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        lines = noise(size)
        rng = random.Random(f"{self._seed}/places")
        places = sorted(rng.sample(range(len(lines)), len(self._chain)))
        for place, assignment in reversed(list(zip(places, self._chain, strict=True))):
            lines.insert(place, assignment)
        return worded(
            self._style.tracking, "\n".join(lines), query=self._value, count=len(self.answers)
        )


class TrackingSample(ChainSample):
    """A chain after one solved example, about other variables, of three letters.

    The example takes at most _EXAMPLE_TOKENS tokens, more only if its smallest size does.
    count: tokens of a text.
    """

    def __init__(self, task: Tracking, style: Style, seed: str, count: Callable[[str], int]):
        super().__init__(task, style, seed)
        example = ChainSample(task, style, f"{seed}/example", EXAMPLE_LETTERS, self.answers)
        shortest = count(str(example.prompt(example.smallest)))
        size, _ = largest_fit(
            lambda size: count(str(example.prompt(size))), max(_EXAMPLE_TOKENS, shortest),
            example.smallest, len(NOISE_WORDS),
        )  # fmt: skip
        separator = " needs " if style.variables == "words" else " "
        self._example = f"{example.prompt(size)} {separator.join(example.answers)}\n\n"

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        prompt = super().prompt(size)
        return Prompt(self._example + prompt.text, prompt.question, prompt.prefix)
